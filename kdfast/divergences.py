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
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from kdfast._names import did_you_mean

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

# What a and b are called, of the divergences that have them.
_PARAMETERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "jsd": ("beta",),
        "skew_forward_kl": ("lam",),
        "skew_reverse_kl": ("lam",),
        "alpha_beta": ("a", "b"),
        "dkd": ("alpha", "beta"),
    }
)

# What the divergences are called elsewhere.
_TERMS: Mapping[str, str] = MappingProxyType(
    {
        "kl": "forward_kl (or reverse_kl)",
        "kld": "forward_kl (or reverse_kl)",
        "kldiv": "forward_kl (or reverse_kl)",
        "kl_div": "forward_kl (or reverse_kl)",
        "kl_loss": "forward_kl (or reverse_kl)",
        "kldivloss": "forward_kl (or reverse_kl)",
        "kl_divergence": "forward_kl (or reverse_kl)",
        "kullback_leibler": "forward_kl (or reverse_kl)",
        "fkl": "forward_kl",
        "forward": "forward_kl",
        "rkl": "reverse_kl",
        "reverse": "reverse_kl",
        "js": "jsd",
        "jsdiv": "jsd",
        "js_div": "jsd",
        "js_divergence": "jsd",
        "js_distance": "jsd",
        "jensen_shannon": "jsd",
        "gjsd": "kdfast.jsd(beta)",
        "generalized_jsd": "kdfast.jsd(beta)",
        "gkd": "kdfast.jsd(beta)",
        "jeffreys": "symmetric_kl",
        "symmetric": "symmetric_kl",
        "skl": "symmetric_kl",
        "ce": "soft_ce",
        "cross_entropy": "soft_ce",
        "soft_cross_entropy": "soft_ce",
        "soft_target": "soft_ce",
        "tv": "tvd",
        "total_variation": "tvd",
        "l1": "tvd",
        "mse": "logit_mse",
        "mse_loss": "logit_mse",
        "l2": "logit_mse",
        "hellinger": "squared_hellinger",
        "chi2": "pearson_chi2 or neyman_chi2",
        "ab": "alpha_beta",
        "abkd": "alpha_beta",
        "sfkl": "skew_forward_kl",
        "skew_kl": "skew_forward_kl",
        "skewed_forward_kl": "skew_forward_kl",
        "srkl": "skew_reverse_kl",
        "skewed_reverse_kl": "skew_reverse_kl",
        "ls": 'Divergence("forward_kl", standardize=True)',
        "lskd": 'Divergence("forward_kl", standardize=True)',
    }
)

_NOT_GIVEN = float("nan")  # this very object; any other NaN is one that somebody computed


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
        TypeError: a name that is no string, a parameter that is no number, a flag that is no bool.
        ValueError: an unknown name, a parameter out of its range, or one that the divergence does not have.
    """

    name: str
    a: float = _NOT_GIVEN
    b: float = _NOT_GIVEN
    normalize: bool = False
    standardize: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"the name of a divergence must be a string, got {type(self.name).__name__}")
        if self.name not in _DEFAULTS:
            meant = did_you_mean(self.name, _DEFAULTS, _TERMS)
            raise ValueError(f"divergence {self.name!r} is unknown; expected one of {', '.join(_DEFAULTS)}{meant}")
        for flag in ("normalize", "standardize"):
            if not isinstance(getattr(self, flag), bool):
                raise TypeError(f"{self.name}: {flag} must be a bool, got {type(getattr(self, flag)).__name__}")
        for i, parameter in enumerate(("a", "b")):
            object.__setattr__(self, parameter, self._parameter(i, getattr(self, parameter)))
        self._check()

    def _parameter(self, i: int, value: object) -> float:
        """Parameter ``i``, or its default where it was not given."""
        if value is _NOT_GIVEN:
            return _DEFAULTS[self.name][i]
        names = _PARAMETERS.get(self.name, ())
        called = names[i] if i < len(names) else "ab"[i]
        try:  # a number of any kind, a tensor's included
            number = math.nan if isinstance(value, (bool, str, bytes)) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError, OverflowError):
            number = math.nan
        if not isinstance(value, float) and number != number:
            raise TypeError(f"{self.name}: {called} must be a number, got {type(value).__name__}")
        # 0 is what such a divergence stores for it, and what dataclasses.replace hands over.
        if i >= len(names) and number != 0.0:
            raise ValueError(f"{self.name} has no parameter {called}, got {number}")
        if not abs(number) < math.inf:
            raise ValueError(f"{self.name}: {called} must be finite, got {number}")
        return number

    def _check(self) -> None:
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
