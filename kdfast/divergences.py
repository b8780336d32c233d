"""The divergences ``kd_loss`` can minimise, as small frozen values.

With ``p`` the teacher's distribution, ``q`` the student's and ``d = log p - log q``:

=====================  =======================================================================  ==================
name                   D                                                                        source
=====================  =======================================================================  ==================
``forward_kl``         KL(p || q)                                                               Hinton 2015
``soft_ce``            -sum p log q  (forward KL plus the teacher's entropy)                    Hinton 2015
``reverse_kl``         KL(q || p)                                                               MiniLLM 2023
``symmetric_kl``       half of each                                                             Jeffreys
``jsd``                beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q      GKD 2023
``skew_forward_kl``    KL(p || lam p + (1 - lam) q)                                             DistiLLM 2024
``skew_reverse_kl``    KL(q || lam q + (1 - lam) p)                                             DistiLLM 2024
``tvd``                sum |p - q| / 2                                                          f-distill 2023
``alpha_beta``         -sum(p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)) / (a b)                ABKD 2025
``dkd``                alpha TCKD + beta NCKD, split at the label                               DKD 2022
``logit_mse``          mean over the valid vocabulary of (z_s - z_t)^2, no temperature          Ba & Caruana 2014
``squared_hellinger``  sum (sqrt p - sqrt q)^2 / 2                                              f-GAN 2016
``pearson_chi2``       sum (p - q)^2 / q                                                        f-GAN 2016
``neyman_chi2``        sum (p - q)^2 / p                                                        f-GAN 2016
=====================  =======================================================================  ==================

The chi-squared divergences grow with the square of a ratio of probabilities. Where that leaves the range of the loss's
dtype (in float32, logits some 88 nats apart) the loss is +inf and the gradient is not finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

__all__ = [
    "DIVERGENCES",
    "Divergence",
    "alpha_beta",
    "dkd",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
]

# What a bare name means for the divergences that take parameters.
_DEFAULTS: dict[str, tuple[float, float]] = {
    "forward_kl": (0.0, 0.0),
    "soft_ce": (0.0, 0.0),
    "reverse_kl": (0.0, 0.0),
    "symmetric_kl": (0.0, 0.0),
    "jsd": (0.5, 0.0),
    "skew_forward_kl": (0.1, 0.0),
    "skew_reverse_kl": (0.1, 0.0),
    "tvd": (0.0, 0.0),
    "alpha_beta": (0.2, 0.7),
    "dkd": (1.0, 8.0),
    "logit_mse": (0.0, 0.0),
    "squared_hellinger": (0.0, 0.0),
    "pearson_chi2": (0.0, 0.0),
    "neyman_chi2": (0.0, 0.0),
}

DIVERGENCES: tuple[str, ...] = tuple(_DEFAULTS)


@dataclass(frozen=True)
class Divergence:
    """A divergence and its parameters.

    ``Divergence("reverse_kl")``, ``jsd(0.1, normalize=True)``, ``Divergence("forward_kl", standardize=True)``.

    Args:
        name: one of the names in this module's table.
        a, b: its parameters, named as the factories name them (``jsd``: a = beta; ``skew_*``: a = lam;
            ``alpha_beta``: a, b; ``dkd``: a = alpha, b = beta).
        normalize: ``jsd`` only: divide by beta (1 - beta), continuous with forward KL at 0 and reverse KL at 1.
        standardize: z-score both sides' logits over the shared finite vocabulary first (LS-KD, Sun et al. 2024),
            with the population standard deviation; a constant row counts as all zeros, with zero gradient. The authors'
            code has the sample's: temperature T sqrt(C / (C - 1)) and weight (C - 1) / C give its loss of C classes.

    Raises:
        ValueError: unknown name, or a parameter out of its range.
    """

    name: str
    a: float = math.nan
    b: float = math.nan
    normalize: bool = False
    standardize: bool = False

    def __post_init__(self) -> None:
        if self.name not in _DEFAULTS:
            raise ValueError(f"divergence {self.name!r} is unknown; expected one of {', '.join(_DEFAULTS)}")
        a, b = _DEFAULTS[self.name]
        # NaN stands for "not given"; it is the one number that differs from itself.
        object.__setattr__(self, "a", float(a if self.a != self.a else self.a))
        object.__setattr__(self, "b", float(b if self.b != self.b else self.b))
        self._check()

    def _check(self) -> None:
        if not (abs(self.a) < math.inf and abs(self.b) < math.inf):
            raise ValueError(f"{self.name}: parameters must be finite, got {self.a} and {self.b}")
        if self.normalize and self.name != "jsd":
            raise ValueError(f"normalize applies to jsd only, got {self.name}")
        if self.name == "jsd" and self.normalize and not 0.0 <= self.a <= 1.0:
            raise ValueError(f"jsd: normalised beta must be in [0, 1], got {self.a}")
        if self.name == "jsd" and not self.normalize and not 0.0 < self.a < 1.0:
            raise ValueError(
                f"jsd: beta must be in (0, 1), got {self.a}: the plain form is 0 there; "
                "normalize=True is continuous with forward KL at 0 and reverse KL at 1"
            )
        if self.name.startswith("skew_") and not 0.0 <= self.a < 1.0:
            raise ValueError(f"{self.name}: lam must be in [0, 1), got {self.a}")

    @classmethod
    def of(cls, divergence: str | Divergence) -> Divergence:
        """The divergence a name stands for; a ``Divergence`` is returned as it is."""
        if isinstance(divergence, Divergence):
            return divergence
        if not isinstance(divergence, str):
            raise TypeError(f"divergence must be a name or a kdfast.Divergence, got {type(divergence).__name__}")
        # Made beforehand: nothing to trace under torch.compile.
        return _NAMED[divergence] if divergence in _NAMED else cls(divergence)

    def canonical(self) -> Divergence:
        """Spell out the divergence's limits: jsd at beta = 0 is forward KL, and no kernel divides by 0."""
        if self.name == "jsd" and self.normalize and self.a in (0.0, 1.0):
            return replace(self, name="reverse_kl" if self.a else "forward_kl", a=0.0, b=0.0, normalize=False)
        if self.name.startswith("skew_") and self.a == 0.0:
            return replace(self, name=self.name.removeprefix("skew_"), a=0.0, b=0.0)
        return self


_NAMED = {name: Divergence(name) for name in _DEFAULTS}


def jsd(beta: float = 0.5, normalize: bool = False, standardize: bool = False) -> Divergence:
    """Generalised Jensen-Shannon divergence (GKD, Agarwal et al. 2023).

    beta is the teacher's weight: DistiLLM's ``js_distance(lam)`` is ``jsd(1 - lam)``. ``jsd(0.5)`` is symmetric to
    rounding, not bit for bit: one logarithm is taken on the student's side, and the teacher's follows from it.
    """
    return Divergence("jsd", a=beta, normalize=normalize, standardize=standardize)


def skew_forward_kl(lam: float = 0.1, standardize: bool = False) -> Divergence:
    """KL(p || lam p + (1 - lam) q) (DistiLLM, Ko et al. 2024).

    The authors' code leaves the teacher's entropy out: the same gradient, another value.
    """
    return Divergence("skew_forward_kl", a=lam, standardize=standardize)


def skew_reverse_kl(lam: float = 0.1, standardize: bool = False) -> Divergence:
    """KL(q || lam q + (1 - lam) p) (DistiLLM, Ko et al. 2024)."""
    return Divergence("skew_reverse_kl", a=lam, standardize=standardize)


def alpha_beta(a: float = 0.2, b: float = 0.7, standardize: bool = False) -> Divergence:
    """Alpha-beta divergence (ABKD, Wang et al. 2025), with its limits at a = 0, b = 0 and a + b = 0.

    The authors' special cases are off by 1 / a or 1 / b from these limits.
    """
    return Divergence("alpha_beta", a=a, b=b, standardize=standardize)


def dkd(alpha: float = 1.0, beta: float = 8.0, standardize: bool = False) -> Divergence:
    """Decoupled KD (Zhao et al. 2022): target-class and non-target-class terms; needs labels and C >= 3."""
    return Divergence("dkd", a=alpha, b=beta, standardize=standardize)
