import numpy as np
import pytest
import timm
import torch
from conftest import tiny_config_with
from PIL import Image
from transformers import BitImageProcessor, CLIPImageProcessor, ViTImageProcessor
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor
from vision_families import LAYERS, build

from evit_hf import EViTForImageClassification, reorganize
from evit_hf.drawing import GONE, HEAT, heat_overlay, macs_in_words, mask_overlay, percent, region_overlay, text_line
from evit_hf.profiling import count_macs, num_macs
from evit_hf.visualization import (
    attentive_patch_mask,
    attentive_patch_picture,
    blank_inattentive_patches,
    seen_box,
    visualize,
)
from evit_training.measuring.html_report import _stage


SQUARE = ViTImageProcessor(size={"height": 32, "width": 32})


def test_mask_marks_the_kept_patches_and_no_fused_token():
    index = torch.tensor([[3, -1, 2], [1, 2, 3]])
    mask = attentive_patch_mask(index, 4)
    assert mask.tolist() == [[False, False, True, True], [False, True, True, True]]


def test_inattentive_patches_are_blank_and_the_others_untouched():
    images = torch.arange(2 * 4 * 6, dtype=torch.float).view(1, 2, 4, 6)
    blanked = blank_inattentive_patches(images, torch.tensor([[1, 3]]), (2, 3), blank=(-1.0, -2.0))
    assert torch.equal(blanked[:, :, :2, 3:], images[:, :, :2, 3:])
    assert torch.equal(blanked[:, :, 2:, 3:], images[:, :, 2:, 3:])
    assert (blanked[:, 0, :, :3] == -1).all()
    assert (blanked[:, 1, :, :3] == -2).all()


def test_margins_without_a_whole_patch_are_blank():
    blanked = blank_inattentive_patches(torch.zeros(1, 3, 9, 11), torch.arange(20).view(1, -1), 2)
    assert (blanked[:, :, 8:] == 1).all()
    assert (blanked[..., 10:] == 1).all()
    assert (blanked[:, :, :8, :10] == 0).all()


def test_picture_shows_image_and_stages_side_by_side():
    images = torch.rand(2, 1, 8, 8)
    picture = attentive_patch_picture(images, [torch.tensor([[0], [1]])], 4, min_pixels=16, margin=1, blank=(0, 0, 1))
    assert picture.size == (2 * (16 + 2), 2 * (16 + 2))
    assert picture.getpixel((1, 1))[0] == pytest.approx(images[0, 0, 0, 0].item() * 255, abs=1)
    assert picture.getpixel((18 + 1 + 15, 1)) == (0, 0, 255)  # patch 1 of the first image
    assert picture.getpixel((18 + 1, 1)) == picture.getpixel((1, 1))  # patch 0 stays


def test_captions_fit_above_their_columns():
    images, index = torch.rand(1, 3, 8, 8), [torch.tensor([[0]])]
    plain = attentive_patch_picture(images, index, 4, min_pixels=160)
    for captions in (["4 patches", "layer 1: 1 kept"], ["a", "a very long caption that does not fit at all " * 3]):
        picture = attentive_patch_picture(images, index, 4, min_pixels=160, captions=captions)
        assert picture.width == plain.width == 2 * 168
        above = picture.height - plain.height
        assert picture.crop((0, above, *picture.size)).tobytes() == plain.tobytes()
        for left in (0, 168):
            assert len(picture.crop((left, 0, left + 168, above)).getcolors()) > 2  # ink on paper


def test_pictures_need_the_images_of_the_output():
    with pytest.raises(ValueError, match=r"is for batches of \[3\] but there are 2 images"):
        attentive_patch_picture(torch.rand(2, 3, 8, 8), [torch.zeros(3, 1, dtype=torch.long)], 4)


def test_picture_of_a_models_output(tiny_model, images):
    picture = attentive_patch_picture(images.sigmoid(), tiny_model(images).attentive_index, 8)
    assert picture.size == (4 * (96 + 8), 3 * (96 + 8))


# --- One picture at several keep rates ------------------------------------------------------------------------------


def timm_processor():
    return TimmWrapperImageProcessor(timm.create_model("vit_tiny_patch16_224", depth=0).pretrained_cfg)


@pytest.mark.parametrize("size", [(400, 250), (250, 400), (91, 260), (224, 224)])
@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessor(size={"height": 224, "width": 224}, do_normalize=False),
        CLIPImageProcessor(do_normalize=False),
        BitImageProcessor(
            size={"shortest_edge": 256},
            crop_size={"height": 224, "width": 224},
            do_center_crop=True,
            do_normalize=False,
        ),
        ViTImageProcessor(
            size={"height": 256, "width": 300},
            do_center_crop=True,
            crop_size={"height": 224, "width": 224},
            do_normalize=False,
        ),
        timm_processor(),
    ],
    ids=["squash", "clip", "dinov2", "oblong", "timm"],
)
def test_what_the_model_sees_is_found_in_the_picture(processor, size):
    """The picture tells its own coordinates: red grows to the right, green downward."""
    width, height = size
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.round(np.linspace(0, 255, width))[None]
    ramp[..., 1] = np.round(np.linspace(0, 255, height))[:, None]
    pixels = torch.as_tensor(processor(Image.fromarray(ramp), return_tensors="pt")["pixel_values"])[0]
    if processor.to_dict().get("data_config"):
        pixels = pixels * 0.5 + 0.5
    left, top, right, bottom = seen_box(size, processor)
    for channel, low, high, length in ((0, left, right, width), (1, top, bottom, height)):
        along = pixels[channel].mean(channel) * (length - 1)
        for place in (0.25, 0.5, 0.75):
            expected = low + (high - low) * place
            assert along[int(place * 224)].item() == pytest.approx(expected, abs=1 + 0.01 * length)


def test_a_crop_larger_than_the_picture_reaches_beyond_it():
    processor = ViTImageProcessor(do_resize=False, do_center_crop=True, crop_size={"height": 60, "width": 60})
    assert seen_box((40, 100), processor) == (-10, 20, 50, 80)
    with pytest.raises(ValueError, match="which cannot be mapped back to the picture"):
        seen_box((40, 100), ViTImageProcessor(size={"longest_edge": 60}))


def test_overlays_have_a_pixel_for_each_patch():
    overlay = mask_overlay(torch.tensor([[True, False]]))
    assert overlay.size == (2, 1)
    assert overlay.getpixel((0, 0))[3] == 0
    assert overlay.getpixel((1, 0))[:3] == GONE
    heat = heat_overlay(torch.tensor([[0.0, 0.5], [0.1, 0.5]]), opacity=1.0)
    assert heat.getpixel((0, 0)) == (*HEAT[0], 255)
    assert heat.getpixel((1, 1)) == (*HEAT[-1], 255)
    assert heat.getpixel((0, 1)) == (*HEAT[1], 255)
    assert heat_overlay(torch.zeros(1, 1)).getpixel((0, 0))[:3] == HEAT[0]


def test_text_is_one_line_and_fits():
    line = text_line("a\nvery long name " * 20, 200, right="3 GMACs")
    assert line.size == text_line("x", 200).size
    assert [percent(x) for x in (1, 0.999, 0.81, 0.0431, 0.00064, 0)] == [
        "100 %",
        "99.9 %",
        "81 %",
        "4.3 %",
        "0.06 %",
        "0.00 %",
    ]
    assert [macs_in_words(x) for x in (4.6e9, 1.48e7, 361e9, 730_000)] == [
        "4.6 GMACs",
        "14.8 MMACs",
        "361 GMACs",
        "0.73 MMACs",
    ]


def test_a_picture_is_seen_at_each_keep_rate_beside_the_dense_model(tiny_model):
    picture = Image.effect_noise((90, 60), 90).convert("RGB")
    tiny_model.train()
    seen = visualize(tiny_model, SQUARE, picture, [0.7, None, [1.0, 0.5, 0.5]], "noise")
    assert tiny_model.training
    tiny_model.eval()
    assert [view.keep_rate for view in seen.views] == [0.7, 0.6, [1.0, 0.5, 0.5]]
    pixel_values = SQUARE(picture, return_tensors="pt")["pixel_values"]
    for view in (seen.dense, *seen.views):
        output = tiny_model(pixel_values, keep_rate=view.keep_rate)
        best = output.logits[0].softmax(-1).topk(3)
        assert [name for name, _ in view.answers] == [f"LABEL_{i}" for i in best.indices.tolist()]
        assert [score for _, score in view.answers] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert view.macs == num_macs(tiny_model.config, view.keep_rate)
        assert list(view.macs_so_far) == sorted(view.macs_so_far)
        assert view.macs_so_far[-1] == view.macs  # the last layer reorganizes
        assert view.num_patches == 16
    assert seen.views[1].caption(0) == (
        "layer 1: 10 of 16 kept",
        f"1 fused, {macs_in_words(seen.views[1].macs_so_far[0])} so far",
    )
    assert seen.views[0].name == "keep rate 0.7"
    assert seen.box == (0, 0, 90, 60)


def test_a_counted_model_shows_who_counts_whom_at_a_share_of_operations():
    """Patches of one region have one colour, thin on the patch of its token; five layers are drawn in four columns."""
    torch.manual_seed(0)
    model = EViTForImageClassification(tiny_config_with(image_size=64, num_hidden_layers=5, initializer_range=0.2))
    processor = ViTImageProcessor(size={"height": 64, "width": 64})
    seen = visualize(model, processor, Image.effect_noise((64, 64), 90), name="x", macs=[0.7])
    (view,) = seen.views
    assert (view.name, view.macs, len(view.trace.stages)) == ("macs=0.7", num_macs(model.config, macs=0.7), 5)
    counted_by, kept = view.trace.output.counted_by[0], view.trace.output.patch_index[0]
    overlay = np.asarray(region_overlay(counted_by.view(8, 8), view.trace.kept(4)[0])).reshape(64, 4)
    colors = [tuple(pixel[:3]) for pixel in overlay]
    assert all(colors[patch] == colors[kept[counted_by[patch]]] for patch in range(64))
    assert {patch for patch in range(64) if overlay[patch][3] == 40} == set(kept.tolist())
    assert len(set(colors)) == len(kept)
    assert seen.regions(view).size == seen.kept(view, 4).size
    assert seen.regions(seen.dense) is None or len(seen.dense.trace.output.token_sizes[0]) == 64
    assert seen.sheet().width < 6 * 272
    *others, last = [_stage(view, i) for i in range(5)]  # of the HTML report
    assert "weights" in last["maps"]
    assert f"{len(kept)} tokens" in last["captions"]["weights"][0]
    assert not any("weights" in one["maps"] for one in others)


def test_given_up_patches_are_painted_over_where_they_are(tiny_model):
    """A wide picture of which the model sees the middle third."""
    processor = ViTImageProcessor(
        size={"shortest_edge": 32}, do_center_crop=True, crop_size={"height": 32, "width": 32}
    )
    picture = Image.new("RGB", (240, 80), (200, 30, 30))
    seen = visualize(tiny_model, processor, picture, [0.5])
    assert seen.box == (80, 0, 160, 80)
    (view,) = seen.views
    kept, drawn = view.trace.kept(0)[0], seen.kept(view, 0)
    assert drawn.size == (240, 80)
    for row in range(4):
        for column in range(4):
            red, _, blue = drawn.getpixel((80 + 20 * column + 10, 20 * row + 10))
            assert (red > blue) == bool(kept[row, column])
    assert drawn.getpixel((40, 40)) == drawn.getpixel((200, 40)) != (200, 30, 30)  # not seen
    heat = seen.attention(view, 1)
    assert heat.getpixel((40, 40)) == seen.fused_weights(view, 0).getpixel((40, 40))
    row, column = divmod(int(view.trace.attention(1)[0].argmax()), 4)
    brightest = max((sum(heat.getpixel((x, y))), x, y) for x in range(90, 160, 20) for y in range(10, 80, 20))
    assert brightest[1:] == (80 + 20 * column + 10, 20 * row + 10)


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "dropped"])
def test_a_sheet_has_a_column_for_each_layer(fuse):
    torch.manual_seed(0)
    labels = {i: f"class {i}\n" * 9 for i in range(5)}
    model = EViTForImageClassification(
        tiny_config_with(inattentive_tokens="fused" if fuse else "dropped", id2label=labels)
    )
    seen = visualize(model, SQUARE, Image.effect_noise((50, 80), 90), [0.7], "x" * 200)
    assert (seen.fused_weights(seen.views[0], 0) is not None) == fuse
    sheet = seen.sheet()
    assert sheet.width == 4 * 272 + 12
    assert len(sheet.getcolors(1_000_000)) > 100


def test_an_animation_steps_through_the_layers(tiny_model, tmp_path):
    seen = visualize(tiny_model, SQUARE, Image.effect_noise((50, 80), 90), [0.7, 0.5])
    for name in ("a.webp", "a.gif"):
        seen.save_animation(tmp_path / name)
        animation = Image.open(tmp_path / name)
        assert animation.n_frames == 4
        assert animation.info["loop"] == 0


def test_other_families_and_models_without_classes_are_seen():
    model = reorganize(build("dinov2-registers"), keep_rate=0.6, reorganization_layers=LAYERS)
    processor = ViTImageProcessor(size={"height": 48, "width": 48})
    seen = visualize(model, processor, Image.effect_noise((50, 80), 90))
    pixel_values = torch.zeros(1, 3, 48, 48)
    assert seen.views[0].macs == num_macs(model, 0.6)
    assert seen.dense.macs == count_macs(model, pixel_values, keep_rate=1.0)
    assert len(seen.views[0].answers) == 3
    bare = reorganize(build("dinov3"), keep_rate=0.6, reorganization_layers=LAYERS)
    seen = visualize(bare, processor, Image.effect_noise((50, 80), 90))
    assert seen.views[0].answers == ()
    assert seen.sheet().width == 4 * 272 + 12
