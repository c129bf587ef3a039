"""EViT under the common model tests of Transformers, which `run.py` puts next to a copy of this file."""

import tempfile
import unittest

import torch
from parameterized import parameterized
from safetensors.torch import load_file, save_file
from transformers.models.auto import modeling_auto

from evit_hf import (
    EViTConfig,
    EViTForImageClassification,
    EViTForImageClassificationWithTeacher,
    EViTLVConfig,
    EViTLVForImageClassification,
    EViTLVModel,
    EViTModel,
)

from .test_configuration_common import ConfigTester
from .test_modeling_common import (
    TEST_EAGER_MATCHES_SDPA_INFERENCE_PARAMETERIZATION,
    ModelTesterMixin,
    _test_eager_matches_sdpa_inference,
    floats_tensor,
    ids_tensor,
)


for model_type, prefix in (("evit", "EViT"), ("evit_lv", "EViTLV")):
    modeling_auto.MODEL_MAPPING_NAMES[model_type] = f"{prefix}Model"
    classes = [f"{prefix}ForImageClassification", f"{prefix}ForImageClassificationWithTeacher"]
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[model_type] = tuple(classes)


class EViTModelTester:
    """The tiny model that the common tests ask for."""

    config_class = EViTConfig
    num_prefix_tokens = 1

    def __init__(self, parent):
        self.parent = parent
        self.batch_size, self.image_size, self.num_channels = 13, 12, 3
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 32, 2, 4
        self.seq_length = (
            36 + self.num_prefix_tokens
        )  # where the first attention sees the tokens, before any reorganization
        self.keep_rate = 0.7
        self.is_training, self.num_labels = True, 3

    def get_config(self):
        distilled = {"use_distillation_token": True} if self.num_prefix_tokens == 2 else {}
        return self.config_class(
            image_size=self.image_size,
            patch_size=2,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            num_labels=self.num_labels,
            keep_rate=self.keep_rate,
            **distilled,
            reorganization_layers=[1],  # the common tests want one sequence length for all attentions
            # The common tests set the epsilons of all norms to 1: from weights of 0.02 every patch gets the same
            # attention, up to rounding, and another batch size may keep other ones.
            initializer_range=0.2,
        )

    def prepare_config_and_inputs(self):
        pixel_values = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        return self.get_config(), pixel_values, ids_tensor([self.batch_size], self.num_labels)

    def prepare_config_and_inputs_for_common(self):
        config, pixel_values, _ = self.prepare_config_and_inputs()
        return config, {"pixel_values": pixel_values}


class EViTModelTest(ModelTesterMixin, unittest.TestCase):
    """All common tests; those that cannot hold for EViT say why."""

    all_model_classes = (EViTModel, EViTForImageClassification)
    model_tester_class = EViTModelTester
    test_resize_embeddings = False
    test_torch_exportable = True

    def setUp(self):
        self.model_tester = self.model_tester_class(self)
        config_class = self.model_tester_class.config_class
        sizes = {"hidden_size": 32, "num_attention_heads": 4}
        self.config_tester = ConfigTester(self, config_class=config_class, has_text_modality=False, **sizes)

    # Where EViT differs on purpose

    @parameterized.expand(TEST_EAGER_MATCHES_SDPA_INFERENCE_PARAMETERIZATION)
    def test_eager_matches_sdpa_inference(self, name, dtype, *args):
        """In half precision nearly equal scores change places, and with them rows of the hidden states."""
        if dtype != "fp32":
            self.model_tester.keep_rate = 1.0
        _test_eager_matches_sdpa_inference(self, name, dtype, *args)

    def test_model_get_set_embeddings(self):
        """As in Transformers' own test of ViT: the input embeddings are a convolution."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertIsInstance(model.get_input_embeddings(), torch.nn.Module)
            self.assertIsNone(model.get_output_embeddings())

    def test_can_load_ignoring_mismatched_shapes(self):
        """A different number of classes renews the head without being asked to; tests/test_checkpoints.py shows it."""
        config, model_class = self.model_tester.get_config(), self.all_model_classes[-1]
        with tempfile.TemporaryDirectory() as folder:
            model_class(config).save_pretrained(folder)
            self.assertEqual(model_class.from_pretrained(folder, num_labels=42).num_labels, 42)
            with self.assertRaises(RuntimeError):
                model_class.from_pretrained(folder, num_labels=42, ignore_mismatched_sizes=False)

    def test_model_weights_reload_no_missing_tied_weights(self):
        """Transformers logs that all weights are missing; EViT refuses."""
        with tempfile.TemporaryDirectory() as folder:
            self.all_model_classes[0](self.model_tester.get_config()).save_pretrained(folder)
            save_file({"tensor": torch.ones(10**6)}, f"{folder}/model.safetensors", {"format": "pt"})
            with self.assertRaisesRegex(RuntimeError, "would be left at random values"):
                self.all_model_classes[0].from_pretrained(folder)

    def test_reverse_loading_mapping(self):
        """EViT writes the names that it has in memory; with `save_original_format=True` it writes ViT's old ones."""
        with tempfile.TemporaryDirectory() as folder:
            model = self.all_model_classes[0](self.model_tester.get_config())
            model.save_pretrained(folder)
            self.assertEqual(set(load_file(f"{folder}/model.safetensors")), set(model.state_dict()))
            if model.config.model_type == "evit_lv":  # was never a model of Transformers
                return
            model.save_pretrained(folder, save_original_format=True)
            self.assertIn("encoder.layer.0.attention.attention.query.weight", load_file(f"{folder}/model.safetensors"))

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model_shapes(self):
        config, pixel_values, labels = self.model_tester.prepare_config_and_inputs()
        outputs = self.all_model_classes[-1](config).eval()(pixel_values, labels=labels)
        self.assertEqual(outputs.logits.shape, (13, 3))
        self.assertTrue(torch.isfinite(outputs.loss))


class EViTDistilledModelTester(EViTModelTester):
    """With a distillation token."""

    num_prefix_tokens = 2


class EViTDistilledModelTest(EViTModelTest):
    """The same tests with a distillation token and two classifiers."""

    all_model_classes = (EViTModel, EViTForImageClassificationWithTeacher)
    model_tester_class = EViTDistilledModelTester


class EViTLVModelTester(EViTModelTester):
    """On LV-ViT."""

    config_class = EViTLVConfig


class EViTLVModelTest(EViTModelTest):
    """The same tests on LV-ViT."""

    all_model_classes = (EViTLVModel, EViTLVForImageClassification)
    model_tester_class = EViTLVModelTester
