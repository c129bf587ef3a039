"""EViT for Hugging Face Transformers: Vision Transformers that reorganize their tokens to run faster.

Importing this package registers EViT with the Auto classes of Transformers.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, ViTImageProcessor
from transformers.utils import is_vision_available

from .configuration_evit import EViTConfig
from .modeling_evit import (
    EViTForImageClassification,
    EViTImageClassifierOutput,
    EViTModel,
    EViTModelOutput,
    EViTPreTrainedModel,
)


__version__ = "0.1.0"

AutoConfig.register("evit", EViTConfig, exist_ok=True)
AutoModel.register(EViTConfig, EViTModel, exist_ok=True)
AutoModelForImageClassification.register(EViTConfig, EViTForImageClassification, exist_ok=True)
if is_vision_available():  # without Pillow there are no image processors to register with
    AutoImageProcessor.register(EViTConfig, ViTImageProcessor, exist_ok=True)

__all__ = [
    "EViTConfig",
    "EViTForImageClassification",
    "EViTImageClassifierOutput",
    "EViTModel",
    "EViTModelOutput",
    "EViTPreTrainedModel",
]
