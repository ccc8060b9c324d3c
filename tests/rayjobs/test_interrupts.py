"""Ctrl-C while Ray Train works."""

from __future__ import annotations

import signal
from typing import Any, cast

import pytest

from rayjobs.ray_train import fit_until_interrupted


class _Trainer:
    """Installs a handler and ends the process, as Ray Train 2.60 does after Ctrl-C."""

    def fit(self) -> Any:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise SystemExit(1)


def test_ctrl_c_in_ray_train_is_a_keyboard_interrupt_and_leaves_no_handler() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit_until_interrupted(cast(Any, _Trainer()))
    assert signal.getsignal(signal.SIGINT) is before
