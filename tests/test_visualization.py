import pytest
import torch

from evit_hf.visualization import attentive_patch_mask, attentive_patch_picture, blank_inattentive_patches


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


def test_pictures_need_the_images_of_the_output():
    with pytest.raises(ValueError, match=r"is for batches of \[3\] but there are 2 images"):
        attentive_patch_picture(torch.rand(2, 3, 8, 8), [torch.zeros(3, 1, dtype=torch.long)], 4)


def test_picture_of_a_models_output(tiny_model, images):
    picture = attentive_patch_picture(images.sigmoid(), tiny_model(images).attentive_index, 8)
    assert picture.size == (4 * (96 + 8), 3 * (96 + 8))
