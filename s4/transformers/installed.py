"""What s4.transformers takes from transformers, and which versions have it."""

import inspect

_NEEDS = "s4.transformers needs transformers 5.4 or newer: pip install 's4-pytorch[transformers]'"
try:
    import transformers
except ModuleNotFoundError as error:
    if error.name != "transformers":  # which is there, but something that it needs is not
        raise
    raise ImportError(_NEEDS) from error
if tuple(int(number) for number in transformers.__version__.split(".")[:2]) < (5, 4):
    raise ImportError(f"{_NEEDS}; version {transformers.__version__} is installed")

from transformers import (  # noqa: E402 - after the check of the version
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import (  # noqa: E402
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.models.auto.modeling_auto import (  # noqa: E402
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

# What `generate` calls the state that it passes on: another name since 5.24.
CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)

__all__ = [
    "CACHE",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "BaseModelOutputWithPast",
    "Cache",
    "CausalLMOutputWithPast",
    "GenerationMixin",
    "PreTrainedConfig",
    "PreTrainedModel",
    "SequenceClassifierOutputWithPast",
]
