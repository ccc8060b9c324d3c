"""The contact sheet and its command."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from image_data.contracts import DataError
from image_data.rendered.dataset import RenderedOptions
from image_data.rendered.sheet import contact_sheet
from rayjobs.render import main


def test_sheet_holds_every_class_and_the_targets():
    sheet = np.asarray(contact_sheet(RenderedOptions(image_size=32), examples=1))
    assert sheet.shape == (10 * (32 + 13), (6 + 3) * 32 + 13, 3)
    tiles = [sheet[r * 45 + 13 : r * 45 + 45, c * 32 : c * 32 + 32] for r in range(10) for c in range(6)]
    assert len({tile.tobytes() for tile in tiles}) == 60
    assert all((tile < 250).any() for tile in tiles)


def test_command_writes_the_same_picture(tmp_path):
    path = tmp_path / "new" / "sheet.png"
    main(["--output", str(path), "--image-size", "32", "--seed", "3", "--examples", "1"])
    expected = contact_sheet(RenderedOptions(image_size=32, seed=3), 1)
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(expected))


@pytest.mark.parametrize("flags", [["--image-size", "10"], ["--examples", "0"], ["--output", "sheet.jpg"], ["--wrong"]])
def test_wrong_flags_end_with_code_2(flags, tmp_path, capsys):
    if "--output" not in flags:
        flags = [*flags, "--output", str(tmp_path / "sheet.png")]
    with pytest.raises(SystemExit) as exit_info:
        main(flags)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err


def test_too_many_examples_are_an_error():
    with pytest.raises(DataError, match="1 to 20"):
        contact_sheet(RenderedOptions(), 21)
