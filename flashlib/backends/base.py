"""What a backend is: a name, a reason why not, and a way to run."""

from __future__ import annotations

from torch import Tensor

from flashlib.config import FlashAttentionConfig
from flashlib.packing import sequences_of
from flashlib.spec import AttentionSpec
from flashlib.values import transforms

__all__ = ["Backend", "BackendUnavailableError"]


class BackendUnavailableError(RuntimeError):
    """The backend asked for cannot run this problem on this machine. The message says what stands against it."""


class Backend:
    """One way to run an :class:`flashlib.AttentionSpec`. Stateless.

    Attributes:
        name: as in ``attention(..., backend=name)``.
        makes_dense_mask: whether a fused kernel is given any other mask than causal as a matrix of Sq x Sk booleans.
        forward_mode: whether tangents go through it (``torch.func.jvp``, ``jacfwd``, ``torch.autograd.forward_ad``).
        second_derivative: whether a derivative can be differentiated again, in either mode.
        repeats_packs: whether a packed sequence that begins where a tile begins gives the same bits whatever else is in the pack.
        has_sinks: whether it takes sinks itself. Into the results of others they are merged, which takes the LSE.
        repeats_gradients: whether the same call gives the same gradients, bit by bit (for flash_attn: under its own setting).
    """

    name: str
    makes_dense_mask: bool = False
    repeats_gradients: bool = True
    forward_mode: bool = True
    second_derivative: bool = False
    has_sinks: bool = False
    repeats_packs: bool = False

    def missing(self) -> str | None:
        """What this machine lacks for any problem at all (a package, a GPU); None if nothing."""
        return None

    def why_not(self, spec: AttentionSpec, config: FlashAttentionConfig) -> str | None:
        """Why this problem cannot be run here; None if it can."""
        return self.missing() or self._beyond(spec, config) or self.unsupported(spec, config)

    def _beyond(self, spec: AttentionSpec, config: FlashAttentionConfig) -> str | None:
        if spec.has_tangents and not self.forward_mode:
            return "has no forward-mode derivative, and an input carries a tangent"
        if spec.has_tangents and not self.second_derivative and transforms("Jvp") > 1:
            return "has no second derivative, and one tangent is pushed forward inside another"
        if spec.dropout_p and not self.second_derivative and transforms("Vmap"):
            return "drops pairs by their place in the batch, which vmap hides from it"
        if config.packing == "aligned" and not self.repeats_packs and sequences_of(spec.mask) is not None:
            return "promises no bits, and packing='aligned' is about bits"
        return None

    def unsupported(self, spec: AttentionSpec, config: FlashAttentionConfig) -> str | None:
        """What in the problem is beyond this backend; None if nothing."""
        raise NotImplementedError

    def how(self, spec: AttentionSpec) -> str | None:
        """What of this backend runs a problem that it can run, if it has several ways."""
        return None

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, config: FlashAttentionConfig
    ) -> tuple[Tensor, Tensor | None]:
        """``(out, lse)``, on the autograd graph. lse may be None if ``spec.return_lse`` is False.

        Only called with a problem for which :meth:`why_not` is None and which has at least one score to compute.
        """
        raise NotImplementedError
