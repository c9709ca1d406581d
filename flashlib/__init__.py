"""FlashAttention, from first principles to the speed of light."""

from flashlib import backends, masks
from flashlib.attention import attention
from flashlib.backends import BackendUnavailableError, explain
from flashlib.config import FlashAttentionConfig, use_config
from flashlib.masks import Mask
from flashlib.partial import Partial
from flashlib.spec import AttentionSpec
from flashlib.values import check_values

__all__ = [
    "AttentionSpec",
    "BackendUnavailableError",
    "FlashAttentionConfig",
    "Mask",
    "Partial",
    "attention",
    "backends",
    "check_values",
    "explain",
    "masks",
    "use_config",
]
