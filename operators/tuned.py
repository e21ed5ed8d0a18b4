"""Options of solvers that suit a family of operators better than the defaults of their classes.

Chosen on validation subjects (one slice of 128 x 128, embedded prior), where they gain more than 0.5 dB. PSNR of the
defaults and of these, in the same number of network calls but for mbir on CT (CG iterations, which call none):
dps: CT 13.3 and 24.1, inpaint 27.3 and 34.7, blur 23.7 and 28.2, sr 25.3 and 32.0, MRI 17.8 and 26.3;
mbir: CT 16.6 and 34.1, inpaint 27.8 and 33.8, blur 18.8 and 29.4, sr 28.1 and 32.2, MRI 19.0 and 24.7, 8 coils 23.8
and 27.2; daps: CT 25.8 and 29.9.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

Suited = dict[str, Any]
Rule = Callable[[Mapping[str, Any]], Suited]  # of the operator as a measurement file describes it
Options = dict[str, Suited | Rule]

_DPS: dict[str, Any] = {"zeta": 5.0, "warm": True, "sigma_max": 2.0}
_MBIR: dict[str, Any] = {"on": "denoised", "steps": 50}
FEW_CG: dict[str, Any] = {**_MBIR, "cg_iterations": 3}  # where CG to its end fits the noise: blur, several coils


def few_views(described: Mapping[str, Any]) -> Suited:
    """Of pnp on CT: the fewer the views, the more the data weigh.

    Validation subject, 256 x 256, lam 0.05, 0.1, 0.15 and 0.3: 30 views 33.3, 33.4, 33.3 and 33.0 dB; 60 views 33.0,
    34.9, 35.2 and 35.0 dB, fan beam alike; 128 x 128, 0.1, 0.15, 0.22 and 0.32: 30 views 34.2, 34.4, 34.3 and 34.1 dB,
    60 views 34.0, 35.7, 36.3 and 36.2 dB. 30 steps gain 0.2 dB over 20 everywhere, 40 less than 0.1 dB more (all this
    without momentum).

    Momentum, two slices of that subject, 256 x 256, 0, 0.5, 0.6, 0.7 and 0.8: 60 views 34.7 (20 steps), 35.0, 35.05,
    35.05 and 35.0 dB; 30 views 33.0, 33.15, 33.15, 33.1 and 32.9 dB; 20 views without 30.0, with 0.7 32.0 and with 0.9
    31.1 dB; 15 views 27.2, 28.1, 28.4, 28.7 and 29.2 dB.
    """
    more = {"momentum": 0.7} if _share(described) < 0.1 else {}
    return {"lam": _lam(described), "cg_error": 0.3, "steps": 30, **more}


def few_views_diffpir(described: Mapping[str, Any]) -> Suited:
    """Of diffpir: validation subject, 30 views, 128 x 128: lam 1 33.6 dB, 0.5 34.1; 256 x 256: 1 32.4, 0.4 32.9. With
    views by the hundred (low dose) it is lam 1 that is 0.4 dB ahead."""
    return {"lam": 3 * _lam(described), "cg_error": 0.3}


def _share(described: Mapping[str, Any]) -> float:
    return len(described["views_deg"]) / math.sqrt(described["rows"] * described["columns"])


def _lam(described: Mapping[str, Any]) -> float:
    return min(0.45 * _share(described) ** 0.7, 0.4)


def limited_angle(described: Mapping[str, Any]) -> Suited:
    """Of pnp on a limited angle: where a wedge of frequencies is missing only the prior fills it, in many steps from a
    higher level.

    Three slices of 128 x 128 of the validation subject, 90 degrees: defaults 26.2 dB; from 0.6 in 80 steps with lam 0.4
    29.0 dB, with a momentum of 0.4 29.5; from 1 with lam 0.5 29.2 dB, but with a momentum of 0.7 and 40 steps 18.1; TV
    25.9. Two slices of 256 x 256: defaults 25.2, this 27.8. Training subjects: defaults 23.6, without momentum 27.9,
    with it 28.9. With 60 degrees momentum loses 0.9 dB on a slice, so narrow arcs have none.
    """
    views = described["views_deg"]
    wide = max(views) - min(views) > 80
    return {"lam": 0.4, "sigma_max": 0.6, "sigma_min": 0.02, "momentum": 0.4 if wide else 0.0, "steps": 80}


def large_pixels(described: Mapping[str, Any]) -> Suited:
    """Of pnp on super-resolution: from pixels more than twice too large on, annealing starts higher and takes its time.

    Two slices each of the CT and the MR validation subject, factor 4, sigma_max 0.3, 0.6 and 1: 30.1, 30.9 and 31.3 dB;
    28.4, 28.55 and 28.5; 31.55 and 28.7 with 1 in 40 steps, no more with 2. With factor 2 no gain.

    On pixels as they are and at 3 mm, one to three slices each, nothing was ahead of it by more than 0.1 dB on both
    subjects: noise drawn before the denoiser (40 steps, fading out: CT at most +0.2, MR -0.2 to 0.0; 80 steps, not
    fading: -0.4 both), sigma_min 0.03 or 0.1 (0.0 to -0.5). The mean of two samples of DDS in 50 steps loses 0.4 to 0.6
    dB, of two to four of PiGDM and moment matching 0.3 to 2.4.
    """
    return {"sigma_max": 1.0, "steps": 40} if described["factor"] > 2 else {}


# pigdm and mm: CG to a part of sigma where it took 50 iterations. Validation subject, 30 views, 128 x 128: pigdm in 50
# steps 33.2 dB exactly, 33.3 with 0.1, 33.0 with 0.3; mm in 8 steps 32.9, 32.7 with 0.03, 32.2 with 0.1.
# mbir: three slices of that subject, one by one, 50 steps of 20 CG iterations (above), 60 of 17 and 70 of 15: 60 views
# 33.7, 33.6 and 33.7 dB, SSIM 0.885, 0.894 and 0.899; 30 views 30.7, 30.9 and 31.2 dB, 0.803, 0.822 and 0.838; 50 of 15
# 31.2 and 28.6 dB.
CT: Options = {
    "pnp": few_views,
    "dps": _DPS,
    "mbir": {"cg_iterations": 15, "steps": 70},
    "daps": {"rate": 1.9, "rate_end": 1.0, "sigma_max": 2.0},
    "diffpir": few_views_diffpir,
    "pigdm": {"cg_error": 0.1},
    "mm": {"cg_error": 0.03},
}
CT_LIMITED: Options = {**CT, "pnp": limited_angle}
# Two slices of 128 x 128 of the validation subject: 34.5 dB with lam 0.22 and sigma_min 0.02, 35.5 with this.
CT_LOW_DOSE: Options = {**CT, "pnp": {"lam": 0.4}, "diffpir": {"lam": 1.0, "cg_error": 0.2}}
IMAGE: Options = {"dps": _DPS, "mbir": {**_MBIR, "cg_iterations": 10}}
# Aliasing is large and coherent: the annealing of pnp starts higher and takes its time, but not so high that the prior
# invents an image around it. One coil, whole slices, sigma_max 0.35, 0.5, 0.7, 1 and 3: validation subject 33.4, 33.5,
# 33.4, 33.3 and 23.2 dB, T2 of a training subject 31.0, 31.2, 29.9, 27.2 and 18.8 dB; 0.35, 0.5 and 1: FLAIR of another
# 32.5, 32.5 and 31.5 dB. Eight coils and radial gain 0.1 dB. With one coil it also ends earlier (28.0 dB,
# and 27.5 with the sigma_min of the defaults). (All this without momentum.) Momentum, three slices of 128 x 128 of
# training subjects, 0, 0.5, 0.6, 0.7 and 0.8: one coil 28.0, 29.85, 30.3, 30.4 and 30.4 dB; eight coils, 4 times 34.3,
# 34.7, 34.8, 34.8 and 34.7 dB, 8 times 25.9, 27.45, 27.7, 27.7 and 27.6 dB.
_ALIASED: Suited = {"sigma_max": 0.5, "momentum": 0.7, "steps": 40}
MRI: Options = {"pnp": _ALIASED, "dps": {**_DPS, "zeta": 10.0}, "mbir": FEW_CG}
MRI_ONE_COIL: Options = {**MRI, "pnp": {**_ALIASED, "sigma_min": 0.02}}
