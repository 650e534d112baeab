"""S4 models for Hugging Face's transformers: its Auto classes, Trainer, generate and pipelines.

Importing this module tells transformers of them; `import s4` does not.
"""

from s4.transformers.base import S4BaseModel, S4PreTrainedModel
from s4.transformers.cache import S4Cache
from s4.transformers.config import S4Config
from s4.transformers.installed import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from s4.transformers.models import S4ForCausalLM, S4ForSequenceClassification

AutoConfig.register(S4Config.model_type, S4Config, exist_ok=True)
AutoModel.register(S4Config, S4BaseModel, exist_ok=True)
AutoModelForCausalLM.register(S4Config, S4ForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(S4Config, S4ForSequenceClassification, exist_ok=True)
# By these names Trainer knows whose labels it shifts where it smooths them, and pipelines what they take.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[S4Config.model_type] = S4ForCausalLM.__name__
MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[S4Config.model_type] = S4ForSequenceClassification.__name__

__all__ = [
    "S4BaseModel",
    "S4Cache",
    "S4Config",
    "S4ForCausalLM",
    "S4ForSequenceClassification",
    "S4PreTrainedModel",
]
