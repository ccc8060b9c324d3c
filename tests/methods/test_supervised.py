"""Cross entropy against the formula, and its gradient by hand."""

from __future__ import annotations

import pytest
import torch

from methods.supervised import Supervised, SupervisedConfig, accuracy, cross_entropy
from tests.methods.examples import TinyBackbone, make_batch, make_context, progress


def test_loss_and_accuracy_are_the_formula():
    torch.manual_seed(0)
    method = Supervised(SupervisedConfig(), TinyBackbone(), make_context()).double()
    batch = make_batch(1)
    output = method(batch, progress())
    weight, bias = method.classifier.weight.detach(), method.classifier.bias.detach()
    features = method.backbone(batch.views[0]).detach()
    expected, hits = 0.0, 0
    for feature, label in zip(features, batch.labels, strict=True):
        logits = [float(w @ feature + b) for w, b in zip(weight, bias, strict=True)]
        total = sum(torch.tensor(logit, dtype=torch.float64).exp() for logit in logits)
        expected -= torch.log(torch.tensor(logits[label], dtype=torch.float64).exp() / total)
        hits += max(range(4), key=logits.__getitem__) == label
    assert output.loss.item() == pytest.approx(float(expected) / 8, rel=1e-9)
    assert output.metrics["accuracy"].item() == hits / 8
    assert not output.metrics["accuracy"].requires_grad


def test_gradient_is_softmax_minus_one_hot():
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2, 1, 1, 0])
    cross_entropy(logits, labels).backward()
    expected = (logits.detach().softmax(1) - torch.eye(3, dtype=torch.float64)[labels]) / 5
    torch.testing.assert_close(logits.grad, expected)


def test_loss_is_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cross_entropy(torch.randn(2, 3, dtype=torch.bfloat16), torch.tensor([0, 1])).dtype == torch.float32


def test_accuracy_counts_hits():
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    assert accuracy(logits, torch.tensor([1, 0, 0, 0])) == 0.75


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="at least 2 classes"):
        Supervised.validate(SupervisedConfig(), make_context(num_classes=1))
