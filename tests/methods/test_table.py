"""Every row of METHODS: the paper's values, training, state round trip; and one process against two."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from methods import METHODS, describe, method_spec
from methods.backbones import LabBackbone
from methods.batchnorm import convert_batchnorm
from methods.byol import Byol, ByolConfig
from methods.camtrast import CamtrastMoCo, CamtrastMoCoConfig, CamtrastSimSiam, CamtrastSimSiamConfig
from methods.cmc import Cmc, CMCConfig
from methods.contracts import Batch, Method, MethodContext
from methods.instdisc import InstDisc, InstDiscConfig
from methods.optimizers import OptimizerConfig, build_optimizer, learning_rate, set_learning_rate
from methods.simclr import SimCLR, SimCLRConfig
from methods.simsiam import SimSiam, SimSiamConfig
from methods.sl_mlp import SLMLP, SLMLPConfig
from methods.supcon import SupCon, SupConConfig
from methods.supervised import Supervised, SupervisedConfig
from methods.swav import Swav, SwavConfig
from tests.methods.distributed import run_processes
from tests.methods.examples import TinyBackbone, make_batch, make_context, progress, train_steps

# The mission's hyperparameters have one name in every config.
PROJECTOR = {"projector_depth", "projector_dim", "projector_hidden_dim"}
SHARED = {"temperature", "queue_size", "momentum", *PROJECTOR}
OWNERS = {
    "supervised": set(),
    "sl_mlp": PROJECTOR,
    "moco_v1": SHARED,
    "moco_v2": SHARED,
    "exemplar_v1": SHARED,
    "exemplar_v2": SHARED,
    "simsiam": PROJECTOR,
    "camtrast_moco": SHARED,
    "camtrast_simsiam": PROJECTOR,
    "camtrast_cam_only": set(),
    "camtrast_contrast_only_moco": SHARED,
    "camtrast_contrast_only_simsiam": PROJECTOR,
    "camtrast_code": PROJECTOR,
    "supcon": PROJECTOR | {"temperature"},
    "instdisc": PROJECTOR | {"temperature"},
    "simclr": PROJECTOR | {"temperature"},
    "byol": PROJECTOR | {"momentum"},
    "swav": PROJECTOR | {"temperature", "queue_size"},
    "rotation": set(),
    "vae": set(),
    "cmc": PROJECTOR | {"temperature"},
    "amdim": {"projector_dim"},
}


def _small(name: str) -> Any:
    config = METHODS[name].config
    changes = {
        "queue_size": 32,
        "projector_dim": 6,
        "predictor_hidden_dim": 3,
        "cam_warmup_epochs": 1,
        "num_negatives": 20,
        "num_prototypes": 5,
        "queue_start_epoch": 0,
        "latent_dim": 6,
    }
    names = {f.name for f in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: v for k, v in changes.items() if k in names})


def _build(name: str, context: MethodContext | None = None) -> Any:
    torch.manual_seed(0)
    return METHODS[name].method(_small(name), _backbone(name), context or make_context()).train()


def _backbone(name: str) -> nn.Module:
    if METHODS[name].color_space == "lab":
        return LabBackbone(TinyBackbone(1), TinyBackbone(2))
    return TinyBackbone()


@pytest.mark.parametrize("name", METHODS)
def test_uses_labels_says_whether_labels_enter_the_loss(name: str) -> None:
    def losses(shift: int) -> list[float]:
        method = _build(name).double()
        found = []
        for step in range(3):
            batch = make_batch(len(METHODS[name].views), seed=step)
            labels = (batch.labels * (1 if shift == 0 else 3) + shift * batch.index) % 4
            torch.manual_seed(step)
            found.append(float(method(Batch(batch.views, labels, batch.index), progress(step)).loss.detach()))
            method.after_step(progress(step))
        return found

    assert (losses(0) != losses(1)) == METHODS[name].uses_labels


def _batch(name: str, step: int) -> Batch:
    """As many views as the method takes; SwAV's small crops are smaller."""
    views = METHODS[name].views
    batch = make_batch(len(views), seed=step, dtype=torch.float32)
    sides = [5 if view == "swav_small" else 8 for view in views]
    return batch._replace(views=[view[:, :, :side, :side] for view, side in zip(batch.views, sides, strict=True)])


def test_the_table_has_the_missions_methods_and_names():
    assert set(METHODS) == set(OWNERS)
    for name, spec in METHODS.items():
        fields = {f.name for f in dataclasses.fields(spec.config)}
        assert fields & SHARED == OWNERS[name]
        for field in fields:  # the help text of the command line
            documented = "".join(cls.__doc__ or "" for cls in type(spec.config).__mro__)
            assert f"        {field}: " in documented, f"{name}: {field} is not documented"


@pytest.mark.parametrize(
    ("name", "values", "views"),
    [
        ("moco_v1", {"temperature": 0.07, "queue_size": 65536, "projector_depth": 1, "momentum": 0.999}, "moco_v1"),
        ("moco_v2", {"temperature": 0.2, "queue_size": 65536, "projector_depth": 2, "momentum": 0.999}, "moco_v2"),
        ("exemplar_v1", {"temperature": 0.07, "projector_depth": 1}, "moco_v1"),
        ("exemplar_v2", {"temperature": 0.1, "projector_depth": 2, "projector_dim": 128}, "moco_v2"),
        ("simsiam", {"projector_depth": 3, "projector_dim": 2048, "predictor_hidden_dim": 512}, "moco_v2"),
    ],
)
def test_presets_have_the_papers_values(name, values, views):
    spec = METHODS[name]
    assert {k: getattr(spec.config, k) for k in values} == values
    assert spec.views == (views, views)


@pytest.mark.parametrize(
    ("name", "rate", "schedule", "every"),
    [
        ("supervised", 0.1, "cosine", "step"),
        ("moco_v1", 0.03, "step", "epoch"),
        ("moco_v2", 0.03, "cosine", "epoch"),
        ("exemplar_v2", 0.03, "cosine", "epoch"),
        ("simsiam", 0.05, "cosine", "epoch"),
        ("camtrast_moco", 0.03, "cosine", "epoch"),
    ],
)
def test_optimisers_are_the_papers(name, rate, schedule, every):
    config = METHODS[name].optimizer
    expected = OptimizerConfig("sgd", rate, weight_decay=1e-4, schedule=schedule, schedule_every=every)
    assert config == expected


def test_residual_blocks_start_as_identities_where_simsiam_says_so():
    assert {name for name, spec in METHODS.items() if spec.zero_init_residual} == {
        "simsiam",
        "camtrast_simsiam",
        "camtrast_contrast_only_simsiam",
        "camtrast_code",
    }


def test_view_recipes_exist():
    from image_data.recipes import RECIPES

    for name, spec in METHODS.items():
        assert set(spec.views) <= set(RECIPES), name


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bf16", [False, True])
def test_three_steps_are_finite_and_move_the_backbone(name, bf16):
    method, spec = _build(name), METHODS[name]
    assert isinstance(method, Method)
    before = [p.detach().clone() for p in method.backbone.parameters()]
    optimizer = build_optimizer(method, spec.optimizer, 8)
    for step in range(3):
        set_learning_rate(optimizer, learning_rate(dataclasses.replace(spec.optimizer, warmup_epochs=0), 8, step, 3, 1))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            output = method(_batch(name, step), progress(step, 3))
        assert output.loss.isfinite()
        assert output.loss.dtype == torch.float32
        assert all(value.float().isfinite() for value in output.metrics.values())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.after_step(progress(step, 3))
    for old, new in zip(before, method.backbone.parameters(), strict=True):
        assert new.isfinite().all()
        assert not torch.equal(old, new)


def _advance(method: nn.Module, optimizer: torch.optim.Optimizer, name: str, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = method(_batch(name, step), progress(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(progress(step))  # type: ignore[operator]
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", METHODS)
def test_resuming_from_state_dicts_is_bit_equal(name, tmp_path):
    straight = _build(name)
    optimizer = build_optimizer(straight, METHODS[name].optimizer, 256)
    _advance(straight, optimizer, name, range(2))
    torch.save({"method": straight.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    expected = _advance(straight, optimizer, name, range(2, 4))

    torch.manual_seed(99)
    resumed = METHODS[name].method(_small(name), _backbone(name), make_context()).train()
    optimizer = build_optimizer(resumed, METHODS[name].optimizer, 256)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["method"])
    optimizer.load_state_dict(state["optimizer"])
    assert _advance(resumed, optimizer, name, range(2, 4)) == expected
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


# One process = two processes. The contrastive keys use two BatchNorm groups: two workers, or two splits in one.


def _two_groups(context: MethodContext) -> int:
    return 2 // context.world_size


def _synchronised(method: nn.Module) -> nn.Module:
    """Methods whose papers normalise on each device: here over all workers, so that their number does not matter."""
    return convert_batchnorm(method, "sync")


# Name -> (views, what builds the method).
BUILDERS: dict[str, tuple[int, Any]] = {
    "supervised": (1, lambda c: Supervised(SupervisedConfig(sync_batchnorm=True), TinyBackbone(), c)),
    "sl_mlp": (1, lambda c: SLMLP(SLMLPConfig(projector_dim=5, sync_batchnorm=True), TinyBackbone(), c)),
    "simsiam": (2, lambda c: SimSiam(SimSiamConfig(3, 7, 6, 3), TinyBackbone(), c)),
    "simclr": (2, lambda c: SimCLR(SimCLRConfig(projector_hidden_dim=7, projector_dim=6), TinyBackbone(), c)),
    "supcon": (2, lambda c: SupCon(SupConConfig(projector_dim=6), TinyBackbone(), c)),
    "byol": (
        2,
        lambda c: Byol(
            ByolConfig(0.9, projector_hidden_dim=20, projector_dim=6, predictor_hidden_dim=20), TinyBackbone(), c
        ),
    ),
    "swav": (
        3,
        lambda c: Swav(
            SwavConfig(
                num_prototypes=5, queue_size=16, queue_start_epoch=0, frozen_prototype_epochs=1, projector_dim=6
            ),
            TinyBackbone(),
            c,
        ),
    ),
    "instdisc": (
        1,
        lambda c: _synchronised(InstDisc(InstDiscConfig(num_negatives=20, projector_dim=6), TinyBackbone(), c)),
    ),
    "cmc": (
        1,
        lambda c: _synchronised(
            Cmc(CMCConfig(num_negatives=20, projector_dim=6), LabBackbone(TinyBackbone(1), TinyBackbone(2)), c)
        ),
    ),
    "camtrast_moco": (
        1,
        lambda c: CamtrastMoCo(
            CamtrastMoCoConfig(cam_warmup_epochs=1, queue_size=16, projector_dim=5, bn_splits=_two_groups(c)),
            TinyBackbone(),
            c,
        ),
    ),
    "camtrast_simsiam": (
        1,
        lambda c: CamtrastSimSiam(
            CamtrastSimSiamConfig(
                cam_warmup_epochs=1, projector_hidden_dim=7, projector_dim=6, predictor_hidden_dim=3
            ),
            TinyBackbone(),
            c,
        ),
    ),
}  # fmt: skip


def _train_all() -> dict[str, Any]:
    results = {name: train_steps(build, views, num_steps=4) for name, (views, build) in BUILDERS.items()}
    # Without synchronisation every worker normalises with its own images, as in the papers.
    results["local"] = train_steps(lambda c: Supervised(SupervisedConfig(), TinyBackbone(), c), 1, num_steps=1)
    return results


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory) -> list[dict[str, Any]]:
    return run_processes(_train_all, 2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", BUILDERS)
def test_two_processes_equal_one(name, in_two_processes):
    views, build = BUILDERS[name]
    one = train_steps(build, views, num_steps=4)
    for two in in_two_processes:
        assert set(two[name]["gradients"]) == set(one["gradients"])
        torch.testing.assert_close(two[name], one, rtol=1e-5, atol=1e-8)


def test_local_batchnorm_is_the_supervised_default(in_two_processes):
    one = train_steps(lambda c: Supervised(SupervisedConfig(), TinyBackbone(), c), 1, num_steps=1)
    assert abs(in_two_processes[0]["local"]["losses"][0] - one["losses"][0]) > 1e-4


def test_unknown_methods_are_refused_with_the_list():
    assert method_spec("moco_v2") is METHODS["moco_v2"]
    with pytest.raises(ValueError, match=r"'mocov2'. Did you mean moco_v2.*supervised, sl_mlp, supcon"):
        method_spec("mocov2")
    with pytest.raises(ValueError, match="Unknown method 'dino'"):
        method_spec("dino")


def test_describe_has_a_line_per_method():
    lines = describe().splitlines()
    assert [line.split()[0] for line in lines] == list(METHODS)
    assert all(spec.summary in line for spec, line in zip(METHODS.values(), lines, strict=True))
