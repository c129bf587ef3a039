"""EViT for Hugging Face Transformers: Vision Transformers that reorganize their tokens to run faster.

Importing this package registers EViT with the Auto classes of Transformers.
"""

from contextlib import suppress

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, ViTImageProcessor
from transformers.utils import is_vision_available

from .configuration_evit import EViTConfig, __version__
from .configuration_evit_lv import EViTLVConfig
from .conversion import convert_checkpoint
from .keep_rate_schedule import KeepRateCallback
from .modeling_evit import (
    EViTForImageClassification,
    EViTForImageClassificationWithTeacher,
    EViTForImageClassificationWithTeacherOutput,
    EViTImageClassifierOutput,
    EViTModel,
    EViTModelOutput,
    EViTPreTrainedModel,
)
from .modeling_evit_lv import EViTLVForImageClassification, EViTLVImageClassifierOutput, EViTLVModel
from .pictures import as_rgb
from .presets import preset_config
from .reorganization import families, reorganize


AutoConfig.register("evit", EViTConfig, exist_ok=True)
AutoModel.register(EViTConfig, EViTModel, exist_ok=True)
AutoModelForImageClassification.register(EViTConfig, EViTForImageClassification, exist_ok=True)
AutoConfig.register("evit_lv", EViTLVConfig, exist_ok=True)
AutoModel.register(EViTLVConfig, EViTLVModel, exist_ok=True)
AutoModelForImageClassification.register(EViTLVConfig, EViTLVForImageClassification, exist_ok=True)
if is_vision_available():  # without Pillow there are no image processors to register with
    for _config in (EViTConfig, EViTLVConfig):
        # Without torchvision the name means the class on Pillow. Transformers 5.9 needs torchvision.
        with suppress(ImportError):
            AutoImageProcessor.register(_config, ViTImageProcessor, ViTImageProcessor, exist_ok=True)

__all__ = [
    "EViTConfig",
    "EViTForImageClassification",
    "EViTForImageClassificationWithTeacher",
    "EViTForImageClassificationWithTeacherOutput",
    "EViTImageClassifierOutput",
    "EViTLVConfig",
    "EViTLVForImageClassification",
    "EViTLVImageClassifierOutput",
    "EViTLVModel",
    "EViTModel",
    "EViTModelOutput",
    "EViTPreTrainedModel",
    "KeepRateCallback",
    "__version__",
    "as_rgb",
    "convert_checkpoint",
    "families",
    "preset_config",
    "reorganize",
]
