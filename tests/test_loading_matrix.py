"""From a file in the layout of every package whose priors are read to a reconstruction, and from its safe form too.

Each file is written here as its package writes it, with random or known weights of a tiny network. How the numbers of
a network come about is compared with other packages in ``test_adm.py``, ``test_edm.py``, ``test_ncsnpp.py``,
``test_unet2d.py`` and ``test_foreign.py``. Pickles go the same way in ``test_pickled.py``.
"""

import json

import pytest
import test_edm
import test_ncsnpp
import test_unet2d
import torch
from foreign_networks import OPTIONS, drawn, normaliser, saved
from safetensors.torch import save_file

from invdiff.operators import build
from invdiff.priors import load_prior
from invdiff.priors.foreign import ImportOptions, import_prior, open_foreign
from invdiff.problem import whiten
from invdiff.solvers import make_solver
from invdiff.solvers.base import iterate

UNCHECKED = ImportOptions(check=False)
DEEPINV = {"img_resolution": 16, "in_channels": 1, "out_channels": 1, "channel_mult": (1, 2), "num_blocks": 1}


def guided(folder):
    return saved(folder / "ema_0.9999_010000.pt", normaliser())


def guided_safetensors(folder):
    save_file(normaliser(), folder / "net.safetensors")
    (folder / "net.json").write_text(json.dumps(OPTIONS))
    return folder / "net.safetensors"


def lightning(folder):
    state = {f"model.diffusion_model.{k}": v for k, v in normaliser().items()}
    torch.save(
        {"state_dict": state | {"betas": torch.linspace(1e-4, 0.02, 1000)}, "callbacks": {}}, folder / "last.ckpt"
    )
    (folder / "last.yaml").write_text("num_head_channels: 16\nnoise_schedule: linear\n")
    return folder / "last.ckpt"


def rectified_flow(folder):
    torch.save({"model_ema": normaliser(), "step": 3}, folder / "flow.pth")
    (folder / "flow.yaml").write_text(
        "num_head_channels: 16\npredicts: velocity-to-data\nprocess: flow-to-data\nlabel_scale: 999\n"
    )
    return folder / "flow.pth"


def score_sde_vp(folder):
    return test_ncsnpp.saved(folder / "checkpoint_24.pth", sde="vpsde", scale_by_sigma=False)


def score_sde_python(folder):
    path = test_ncsnpp.saved(folder / "checkpoint_95.pth")
    path.with_suffix(".json").unlink()
    lines = [f"  config.model.{name} = {value!r}" for name, value in test_ncsnpp.FLAGS.items()]
    path.with_suffix(".py").write_text("\n".join(["import torch", "def get_config():", *lines, "  return config"]))
    return path


def edm(folder):
    return test_edm.write(folder / "edm.safetensors", test_edm.known())


def inverse_bench(folder):
    path = test_edm.write(folder / "mri.pt", test_edm.known())
    (folder / "mri.yaml").write_text("pretrain:\n  _target_: models.precond.EDMPrecond\n  model_type: SongUNet\n")
    return path


def pfgmpp(folder):
    path = test_edm.write(folder / "pfgmpp.pt", test_edm.known())
    (folder / "pfgmpp.json").write_text(json.dumps({"network_kwargs": {"class_name": "EDMPrecond"}, "D": 2048}))
    return path


def deepinv_song(folder):
    from deepinv.models import NCSNpp

    torch.manual_seed(0)
    net = NCSNpp("ncsn", "edm", model_channels=32, attn_resolutions=(8,), pretrained=None, **DEEPINV)
    torch.save(net.state_dict(), folder / "d.pt")
    (folder / "d.yaml").write_text("pixel_std: 0.75\n")
    return folder / "d.pt"


def deepinv_adm(folder):
    from deepinv.models import ADMUNet

    net = ADMUNet(model_channels=64, attn_resolutions=(8,), label_dim=0, pretrained=None, **DEEPINV)
    torch.save(drawn(net), folder / "d.pt")
    (folder / "d.yaml").write_text("pixel_std: 0.75\n")
    return folder / "d.pt"


def deepinv_drunet(folder):
    from deepinv.models import DRUNet

    torch.manual_seed(0)
    torch.save(DRUNet(1, 1, nc=(8, 8, 16, 16), nb=1, pretrained=None).state_dict(), folder / "drunet.pth")
    return folder / "drunet.pth"


def diffusers_folder(folder, scheduler=None):
    package = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'invdiff[diffusers]'")
    return test_unet2d.folder(folder / "pixel", package, scheduler or {"_class_name": "DDPMScheduler"})[0]


def diffusers_flow(folder):
    return diffusers_folder(folder, {"_class_name": "FlowMatchEulerDiscreteScheduler"})


FORMATS = {
    "guided-diffusion": guided,
    "guided-diffusion as safetensors": guided_safetensors,
    "Lightning": lightning,
    "rectified flow": rectified_flow,
    "score_sde VE": lambda folder: test_ncsnpp.saved(folder / "checkpoint_95.pth"),
    "score_sde VP": score_sde_vp,
    "score_sde with Python settings": score_sde_python,
    "EDM": edm,
    "InverseBench": inverse_bench,
    "PFGM++": pfgmpp,
    "deepinv NCSNpp": deepinv_song,
    "deepinv ADMUNet": deepinv_adm,
    "deepinv DRUNet": deepinv_drunet,
    "diffusers, noise": diffusers_folder,
    "diffusers, v": lambda f: diffusers_folder(f, {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}),
    "diffusers, image": lambda f: diffusers_folder(f, {"_class_name": "DDPMScheduler", "prediction_type": "sample"}),
    "diffusers, flow": diffusers_flow,
}


def problem():
    """Half of the pixels of an image of steps and ramps, with noise of 0.05."""
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(-0.5, 0.5, 32).expand(1, 1, 32, 32)
    image = ramp + 0.3 * (ramp.mT > 0)
    operator = build("inpaint", (32, 32), (1.0, 1.0), mask="random:0.5")
    y = operator(image)
    return whiten(y + 0.05 * torch.randn(y.shape, generator=generator), operator, 0.05**2)


def reconstructed(prior):
    most = min(1.0, prior.info.sigma_max)
    *_, last = iterate(make_solver("pnp"), problem(), prior, [most, 0.3 * most, 0.0])
    return last.x0


def check(path, folder, options):
    import_prior(path, folder / "safe", options)
    first = reconstructed(open_foreign(path, options).load())
    assert torch.equal(first, reconstructed(load_prior(folder / "safe")))
    case = problem()
    data = case.y.square().mean()
    assert float((case.operator(first) - case.y).square().mean()) < 0.1 * float(data)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_every_format_reconstructs_and_so_does_its_safe_form(tmp_path, name):
    check(FORMATS[name](tmp_path), tmp_path, UNCHECKED)
