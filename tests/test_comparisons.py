"""`evit evaluate --compare`, and `--macs` of the commands."""

import json

import pytest
import torch
from conftest import tiny_config_with
from test_data import write_parquet
from test_evaluate import evaluate, fresh_accelerate  # noqa: F401
from transformers import ViTImageProcessor
from vision_families import timm_model

from evit_hf import EViTForImageClassification, reorganize, token_reorganization
from evit_hf.token_reorganization import mean_keys
from evit_training.measuring.comparisons import (
    all_ways,
    compare_ways,
    in_place,
    merged_pairs,
    merged_tokens,
    received_attention,
)


@pytest.fixture
def model_folder(tmp_path):
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate("cdab")), "label2id": {name: i for i, name in enumerate("cdab")}}
    config = tiny_config_with(image_size=64, num_labels=4, num_hidden_layers=3, reorganization_layers=[1], **labels)
    EViTForImageClassification(config).save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_tome_merges_the_most_similar_pairs_of_a_loop_over_tokens():
    torch.manual_seed(0)
    keys, tokens, sizes = (
        torch.randn(2, 1, 9, 5).double(),
        torch.randn(2, 8, 6).double(),
        torch.rand(2, 8).double() + 1,
    )
    mean = mean_keys(keys)
    choice = merged_pairs(torch.rand(2, 8), 5, keys=mean, token_sizes=sizes)
    with in_place({"averaged_tokens": merged_tokens}):
        found = token_reorganization.rearrange_tokens(torch.cat((tokens[:, :1], tokens), dim=1), choice)[:, 1:]
    for image in range(2):
        pairs = [max((float(mean[image, i] @ mean[image, j]), i, j) for j in range(1, 8, 2)) for i in range(0, 8, 2)]
        groups = {i: [i] for i in range(8)}
        for _, i, j in sorted(pairs, reverse=True)[:3]:
            groups[j] += groups.pop(i)
        order = sorted(i for i in groups if i % 2 == 0) + [1, 3, 5, 7]
        assert choice.attentive_index[image].tolist() == order
        for place, i in enumerate(order):
            share = sizes[image, groups[i]]
            wanted = (share.unsqueeze(1) * tokens[image, groups[i]]).sum(0) / share.sum()
            assert torch.allclose(found[image, place], wanted, atol=1e-12)
            assert torch.isclose(choice.counted.token_sizes[image, place], share.sum())
            assert all(choice.counted.counted_by[image, member] == place for member in groups[i])
    with pytest.raises(ValueError, match="at most half of 8 tokens in a layer, not 5"):
        merged_pairs(torch.rand(2, 8), 3, keys=mean)


def test_each_way_gives_up_other_tokens_and_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = EViTForImageClassification(tiny_config_with(image_size=64, num_labels=4, initializer_range=0.1)).eval()
    reorganize(model, macs=0.66)
    images = torch.randn(2, 3, 64, 64)
    before = model(images).logits
    found = {}
    for name, way in all_ways().items():
        if not way.in_papers_layers:
            with in_place(way.functions or {}):
                found[name] = model(images).logits
    assert torch.equal(found.pop("counted (macs=)"), before)
    found.pop("dropped in every layer")
    answers = [before, *found.values()]
    assert len(found) == 6
    assert all(not torch.allclose(a, b, atol=1e-6) for i, a in enumerate(answers) for b in answers[:i])
    assert torch.equal(model(images).logits, before)


@pytest.mark.parametrize("kind", ["sdpa", "eager", "timm"])
def test_attention_received_is_read_from_the_whole_map(kind):
    torch.manual_seed(0)
    if kind == "timm":
        model, images = timm_model(), torch.randn(2, 3, 48, 48)
    else:
        config = tiny_config_with(image_size=64, num_labels=4, initializer_range=0.1, attn_implementation=kind)
        model, images = EViTForImageClassification(config).eval(), torch.randn(2, 3, 64, 64)
    reorganize(model, macs=0.66)
    functions, read = all_ways()["counted, attention received"].functions, []

    def reads(probabilities, *rest):
        read.append(probabilities)
        return received_attention(probabilities, *rest)

    with in_place({"class_token_attention": reads}):
        model(images)
    first_rows, read = read, []
    with in_place({**functions, "class_token_attention": reads}):
        model(images)
    row, whole = first_rows[0], read[0]
    assert whole.shape[2] == whole.shape[3] == row.shape[3]
    assert torch.allclose(whole[:, :, 0], row[:, :, 0])
    assert torch.allclose(received_attention(whole), whole.mean(dim=(1, 2))[:, 1:])


def test_all_ways_are_compared_with_paired_errors(model_folder, tmp_path, capsys):
    data = write_parquet(tmp_path / "test.parquet", list("abcabc"))
    evaluate(model_folder, "--dataset", data, "--compare", "--macs", "0.9", "--output-dir", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "comparisons.json").read_text())
    rows = {row["way"]: row for row in report["rows"]}
    assert rows.keys() == all_ways().keys()
    assert report["num_images"] == 6
    assert all(row["gmacs"] <= 0.92 * report["dense_gmacs"] for row in rows.values())
    counted, tome = rows["counted (macs=)"], rows["ToMe"]
    assert tome["cosine_minus_tome"] == tome["agreement_minus_tome"] == [0.0, 0.0]
    difference, error = counted["cosine_minus_tome"]
    assert difference == pytest.approx(counted["cosine"][0] - tome["cosine"][0])
    assert error > 0
    assert "fused in three layers (EViT)" in capsys.readouterr().out


def test_numbers_are_those_of_the_answers():
    torch.manual_seed(0)
    model = EViTForImageClassification(tiny_config_with(image_size=64, num_labels=4, initializer_range=0.1)).eval()
    images, labels = torch.randn(5, 3, 64, 64), torch.tensor([0, 1, 2, 3, 0])
    ways = {name: way for name, way in all_ways().items() if name in ("ToMe", "counted (macs=)")}
    found = compare_ways(model, [(images[:3], labels[:3]), (images[3:], labels[3:])], [0.66, 0.5], ways).in_numbers()
    reorganize(model, macs=0.66)
    row = next(row for row in found.rows if row.way == "counted (macs=)" and row.macs == 0.66)
    dense, answers = model(images, keep_rate=1.0).logits.argmax(1), model(images).logits.argmax(1)
    assert row.top1 == pytest.approx((answers == labels).float().mean().item())
    assert row.agreement[0] == pytest.approx((answers == dense).float().mean().item())
    difference = (answers == labels).float() - (dense == labels).float()
    assert row.top1_minus_dense == pytest.approx((difference.mean().item(), difference.std().item() / 5**0.5))
    assert "ToMe merges at most half" in found.left_out[0]
    assert len(found.rows) == 3


def test_macs_and_keep_rates_exclude_each_other(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("evit_training.measuring.evaluation.images_per_second", lambda *_, **__: [2.0, 3.0])
    data = write_parquet(tmp_path / "test.parquet", list("abcabc"))
    evaluate(model_folder, "--dataset", data, "--macs", "0.7", "--output-dir", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [(row.get("keep_rate"), row.get("macs")) for row in report["results"]] == [(1.0, None), (None, 0.7)]
    assert report["results"][1]["gmacs"] < 0.75 * report["results"][0]["gmacs"]
    for flags, sentence in (
        (["--keep-rates", "0.5"], "`--macs` and `--keep-rates` both say how much is kept"),
        (["--macs", "1.5"], "`--macs` must be in (0, 1], got 1.5"),
    ):
        with pytest.raises(SystemExit) as exit_:
            evaluate(model_folder, "--dataset", data, "--macs", "0.7", *flags)
        assert exit_.value.code == 2
        assert sentence in capsys.readouterr().err
