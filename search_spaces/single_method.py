"""One space per method, named like the method: its own hyperparameters only.

Command: ``python rayjobs/sweep.py --space moco_v2 --num-trials 20``. The ranges are those of
``search_spaces/parameters.py``. Published numbers are ImageNet linear accuracies (percent) after 200 epochs of a
ResNet-50: Zhao et al., ICLR 2021, Table 10 (MoCo, Exemplar) and facebookresearch/simsiam README (100 epochs), for a
user who repeats a setting at full scale.
"""

from __future__ import annotations

from collections.abc import Mapping

from methods import METHODS
from search_spaces.space import SearchSpace
from search_spaces.transfer import presets, sample

__all__ = ["SINGLE_METHOD_SPACES"]

PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "moco_v1": {"K=65536 tau=0.07": 60.8, "K=1M tau=0.07": 60.9},
    "moco_v2": {"K=65536 tau=0.2": 67.5, "K=1M tau=0.1": 66.9, "K=1M tau=0.2": 67.8},
    "exemplar_v1": {"K=1M tau=0.07": 64.6, "K=1M tau=0.1": 63.9},
    "exemplar_v2": {"K=1M tau=0.07": 68.1, "K=1M tau=0.1": 68.9, "K=1M tau=0.2": 67.9},
    "simsiam": {"100 epochs, batch 512": 68.1, "100 epochs, batch 256": 68.3},
}

SINGLE_METHOD_SPACES = tuple(
    SearchSpace(
        name=name,
        methods=(name,),
        sample=sample,
        presets=presets,
        published=PUBLISHED.get(name, {}),
        summary=f"the hyperparameters of {name}: {spec.summary}",
    )
    for name, spec in METHODS.items()
)
