"""The VOC metric against detectron2's, and against cases counted by hand."""

from __future__ import annotations

import ast
import functools
import importlib.util
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from evaluation.detection.objects import Objects
from evaluation.detection.voc_metric import VOC_THRESHOLDS, voc_ap
from tests.evaluation.detection.scenes import detections, image, random_scene

BOX = (10, 10, 50, 50)
FAR = (60, 60, 90, 90)


def detectron2_functions() -> dict[str, Any]:
    """The functions of detectron2's VOC evaluation, without the package around them, which needs compiled parts."""
    spec = importlib.util.find_spec("detectron2")
    assert spec is not None
    assert spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0], "evaluation", "pascal_voc_evaluation.py").read_text()
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    names: dict[str, Any] = {"np": np, "ET": ElementTree, "lru_cache": functools.lru_cache}
    names["PathManager"] = SimpleNamespace(open=open)
    exec(compile(ast.Module(functions, []), "pascal_voc_evaluation.py", "exec"), names)
    return names


def write_voc(folder: Path, found: np.ndarray, objects: list[Objects], num_classes: int) -> None:
    """Annotations and result files as the VOC program reads them: pixels counted from 1, ends included."""
    (folder / "names.txt").write_text("\n".join(map(str, range(len(objects)))))
    for row, one in enumerate(objects):
        root = ElementTree.Element("annotation")
        for label, difficult, (x0, y0, x1, y1) in zip(one.classes, one.difficult, one.boxes.astype(int), strict=True):
            entry = ElementTree.SubElement(root, "object")
            values = {"name": f"c{label}", "pose": "", "truncated": 0, "difficult": int(difficult)}
            for key, value in values.items():
                ElementTree.SubElement(entry, key).text = str(value)
            box = ElementTree.SubElement(entry, "bndbox")
            for key, value in {"xmin": x0 + 1, "ymin": y0 + 1, "xmax": x1, "ymax": y1}.items():
                ElementTree.SubElement(box, key).text = str(value)
        ElementTree.ElementTree(root).write(folder / f"{row}.xml")
    for c in range(num_classes):
        lines = [
            f"{int(row)} {score:.9f} {x0 + 1} {y0 + 1} {x1} {y1}" for row, k, score, x0, y0, x1, y1 in found if k == c
        ]
        (folder / f"c{c}.txt").write_text("\n".join(lines))


@pytest.mark.parametrize("eleven_point", [True, False])
def test_equals_detectron2(tmp_path: Path, eleven_point: bool) -> None:
    voc_eval = detectron2_functions()["voc_eval"]
    for seed in range(3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        found, objects = random_scene(seed)
        write_voc(folder, found, objects, 4)
        score = voc_ap(found, objects, 4, eleven_point)
        assert score.per_class.shape == (4, 10)
        assert 2 < score.ap < 95
        for c in range(4):
            for t in (0, 3, 5, 8):
                files = [str(folder / name) for name in ("{}.txt", "{}.xml", "names.txt")]
                *_, expected = voc_eval(*files, f"c{c}", (50 + 5 * t) / 100, eleven_point)
                assert score.per_class[c, t] == pytest.approx(100 * expected, abs=1e-9)
        assert score.ap == pytest.approx(score.per_class.mean())
        assert score.ap50 == pytest.approx(score.per_class[:, 0].mean())
        assert score.ap75 == pytest.approx(score.per_class[:, 5].mean())


def test_perfect_and_no_detections() -> None:
    objects = [image((0, *BOX), (1, *FAR)), image((1, *BOX)), image()]
    found = detections((0, 0, 0.9, *BOX), (0, 1, 0.8, *FAR), (1, 1, 0.7, *BOX))
    for eleven_point in (True, False):
        perfect = voc_ap(found, objects, 2, eleven_point)
        assert (perfect.ap, perfect.ap50, perfect.ap75) == pytest.approx((100, 100, 100))
        nothing = voc_ap(detections(), objects, 2, eleven_point)
        assert (nothing.ap, nothing.ap50, nothing.ap75) == (0, 0, 0)


def test_by_hand() -> None:
    # Falling scores: correct, wrong, correct of 4 objects. Precision 1, 1/2, 2/3 at recall 1/4, 1/4, 1/2.
    objects = [image((0, *BOX)) for _ in range(4)]
    found = detections((0, 0, 0.9, *BOX), (0, 0, 0.8, *FAR), (1, 0, 0.7, *BOX))
    assert voc_ap(found, objects, 1).ap50 == pytest.approx(100 * (3 * 1 + 3 * 2 / 3) / 11)
    assert voc_ap(found, objects, 1, eleven_point=False).ap50 == pytest.approx(100 * (0.25 + 0.25 * 2 / 3))


def test_an_object_is_found_once_by_the_highest_score() -> None:
    objects = [image((0, *BOX))]
    twice = detections((0, 0, 0.5, *BOX), (0, 0, 0.9, 10, 10, 50, 45))  # IoU 1 and 0.875
    score = voc_ap(twice, objects, 1, eleven_point=False)
    # Up to 0.85 the second row is correct and the first a duplicate; above, it is wrong and the first is correct.
    np.testing.assert_allclose(score.per_class[0], [100] * 8 + [50] * 2)


def test_difficult_objects_and_crowds_do_not_count() -> None:
    objects = [image((0, *BOX), (0, *FAR), difficult=[1]), image((0, *FAR), crowd=[0])]
    found = detections((0, 0, 0.9, *FAR), (0, 0, 0.8, *FAR), (1, 0, 0.7, *FAR), (0, 0, 0.6, *BOX))
    assert voc_ap(found, objects, 1).ap == pytest.approx(100)


def test_the_threshold_itself_is_not_enough() -> None:
    objects = [image((0, 0, 0, 40, 40))]
    half = detections((0, 0, 0.9, 0, 0, 40, 20))
    assert voc_ap(half, objects, 1).ap50 == 0
    assert voc_ap(half, objects, 1, thresholds=[0.49]).per_class[0, 0] == pytest.approx(100)
    assert np.isnan(voc_ap(half, objects, 1, thresholds=[0.49]).ap50)


def test_other_images_and_classes_do_not_match() -> None:
    objects = [image((0, *BOX)), image((1, *FAR))]
    found = detections((1, 0, 0.9, *BOX), (0, 1, 0.9, *FAR), (0, 1, 0.8, *BOX))
    assert voc_ap(found, objects, 2).ap == 0


def test_classes_without_objects_are_left_out() -> None:
    score = voc_ap(detections((0, 2, 0.9, *BOX), (0, 0, 0.9, *FAR)), [image((2, *BOX), (1, *FAR), difficult=[1])], 3)
    assert np.isnan(score.per_class[:2]).all()
    assert score.ap == pytest.approx(100)


def test_malformed_detections() -> None:
    objects = [image((0, *BOX))]
    with pytest.raises(ValueError, match=r"shape \(1, 6\)"):
        voc_ap(np.zeros((1, 6), np.float32), objects, 1)
    with pytest.raises(ValueError, match="1 of 1 detections contain NaN"):
        voc_ap(detections((0, 0, np.nan, *BOX)), objects, 1)
    with pytest.raises(ValueError, match="of image 1; there are image 0 to 0"):
        voc_ap(detections((1, 0, 0.9, *BOX)), objects, 1)
    with pytest.raises(ValueError, match="of class 3; there are class 0 to 0"):
        voc_ap(detections((0, 3, 0.9, *BOX)), objects, 1)
    with pytest.raises(ValueError, match="no object that counts"):
        voc_ap(detections(), [image((0, *BOX), difficult=[0])], 1)


def test_thresholds() -> None:
    assert tuple(percent / 100 for percent in range(50, 100, 5)) == VOC_THRESHOLDS
