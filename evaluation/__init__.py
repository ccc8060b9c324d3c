"""Downstream tasks and analyses: one file each, listed in ``TASKS``.

A task is a frozen config dataclass and five functions of it: ``evaluate`` yields metrics, files and samples,
``protocol`` states as data how they are computed, ``splits`` names the splits that are read, ``check`` refuses
impossible options and data before any long work, ``metric_names`` lists the main metrics. A sixth, ``compare``, may put
several models beside each other. A task that fine-tunes (``evaluation.fine_tuning``) also has ``check_data``, for the
targets it needs. To add one, write the file and one row here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evaluation import (
    alignment,
    cam,
    class_geometry,
    classification,
    concept_generalization,
    depth,
    domains,
    entropy,
    feature_plots,
    few_shot,
    few_shot_augmented,
    few_shot_finetune,
    inversion,
    knn,
    landmarks,
    layer_freezing,
    linear,
    linear_readoff,
    pose,
    uniformity,
    utility,
)
from evaluation.detection import task as detection_task
from evaluation.metric import (
    Artifact,
    ClassCounts,
    EvaluationContext,
    Features,
    Metric,
    ModelResult,
    Output,
    Phase,
    Samples,
)
from evaluation.segmentation import task as segmentation_task
from image_data.prepared import PreparedData

__all__ = [
    "TASKS",
    "Artifact",
    "ClassCounts",
    "EvaluationContext",
    "Features",
    "Metric",
    "ModelResult",
    "Output",
    "Phase",
    "Samples",
    "TaskSpec",
]


@dataclass(frozen=True)
class TaskSpec:
    """One row of ``TASKS``.

    Attributes:
        name: first part of the metric names.
        config: the default config, an instance of the task's frozen dataclass.
        evaluate: ``(config, context)`` -> metrics, files and samples.
        protocol: ``(config, phase)`` -> JSON data that is stored with the metrics.
        splits: ``(config, phase)`` -> the splits that ``evaluate`` reads.
        check: ``(config, phase, class_counts)`` raises ValueError for impossible options or data.
        metric_names: ``config`` -> the main metrics, those that can be an objective.
        summary: one line for help texts and tables.
        direction: which way the main metrics are better; "none" for analyses that describe features.
        needs: "features" alone, or also the "backbone" with images and augmented views; "fine_tuning" tasks train
            copies of the backbone, on the run's own images or on a data set of their own.
        compare: ``(config, models)`` -> metrics and files of two or more models together; None where there is nothing
            to add to a table.
        check_data: ``(config, phase, data)`` raises ValueError where the data lack the targets that the task needs;
            None where class counts tell all.
        paired: whether ``compare`` pairs the models entry by entry, which needs the same scored images.
        grid: a fine-tuning task of many small runs, each of which is one process, however many workers there are.
    """

    name: str
    config: Any
    evaluate: Callable[[Any, EvaluationContext], Iterator[Output]]
    protocol: Callable[[Any, Phase], dict]
    splits: Callable[[Any, Phase], tuple[str, ...]]
    check: Callable[[Any, Phase, ClassCounts], None]
    metric_names: Callable[[Any], tuple[str, ...]]
    summary: str
    direction: Literal["max", "min", "none"] = "max"
    needs: Literal["features", "backbone", "fine_tuning"] = "features"
    compare: Callable[[Any, Sequence[ModelResult]], Iterator[Metric | Artifact]] | None = None
    check_data: Callable[[Any, Phase, PreparedData], None] | None = None
    paired: bool = True
    grid: bool = False

    @property
    def metrics(self) -> tuple[str, ...]:
        """Main metrics of the default config."""
        return self.metric_names(self.config)


TASKS: dict[str, TaskSpec] = {
    "linear": TaskSpec(
        name="linear",
        config=linear.LinearConfig(),
        evaluate=linear.evaluate,
        protocol=linear.protocol,
        splits=linear.splits,
        check=linear.check,
        metric_names=linear.metric_names,
        summary="top-1 of a linear layer on cached features, learning rate chosen on validation images",
        compare=linear.compare,
    ),
    "knn": TaskSpec(
        name="knn",
        config=knn.KnnConfig(),
        evaluate=knn.evaluate,
        protocol=knn.protocol,
        splits=knn.splits,
        check=knn.check,
        metric_names=knn.metric_names,
        summary="top-1 of 200 nearest neighbours with weighted votes",
        compare=knn.compare,
    ),
    "few_shot": TaskSpec(
        name="few_shot",
        config=few_shot.FewShotConfig(),
        evaluate=few_shot.evaluate,
        protocol=few_shot.protocol,
        splits=few_shot.splits,
        check=few_shot.check,
        metric_names=few_shot.metric_names,
        summary="5-way 1- and 5-shot accuracy on classes that pretraining never saw, 600 tasks",
        compare=few_shot.compare,
    ),
    "entropy": TaskSpec(
        name="entropy",
        config=entropy.EntropyConfig(),
        evaluate=entropy.evaluate,
        protocol=entropy.protocol,
        splits=entropy.splits,
        check=entropy.check,
        metric_names=entropy.metric_names,
        summary="representation entropy H_R of the pretraining images",
        direction="none",
        compare=entropy.compare,
        paired=False,
    ),
    "uniformity": TaskSpec(
        name="uniformity",
        config=uniformity.UniformityConfig(),
        evaluate=uniformity.evaluate,
        protocol=uniformity.protocol,
        splits=uniformity.splits,
        check=uniformity.check,
        metric_names=uniformity.metric_names,
        summary="uniformity of unit-length and of raw features over all pairs of pretraining images",
        direction="none",
        compare=uniformity.compare,
        paired=False,
    ),
    "linear_readoff": TaskSpec(
        name="linear_readoff",
        config=linear_readoff.LinearReadoffConfig(),
        evaluate=linear_readoff.evaluate,
        protocol=linear_readoff.protocol,
        splits=linear_readoff.splits,
        check=linear_readoff.check,
        metric_names=linear_readoff.metric_names,
        summary="top-1 of a linear layer trained on augmented views: MoCo's, SimSiam's or BYOL's recipe",
        needs="backbone",
        compare=linear_readoff.compare,
    ),
    "few_shot_rfs": TaskSpec(
        name="few_shot_rfs",
        config=few_shot_augmented.FewShotRfsConfig(),
        evaluate=few_shot_augmented.evaluate,
        protocol=few_shot_augmented.protocol,
        splits=few_shot_augmented.splits,
        check=few_shot_augmented.check,
        metric_names=few_shot_augmented.metric_names,
        summary="few-shot with 5 augmented copies of every support image (RFS)",
        needs="backbone",
        compare=few_shot_augmented.compare,
    ),
    "alignment": TaskSpec(
        name="alignment",
        config=alignment.AlignmentConfig(),
        evaluate=alignment.evaluate,
        protocol=alignment.protocol,
        splits=alignment.splits,
        check=alignment.check,
        metric_names=alignment.metric_names,
        summary="distance of two views of an image, and of two images of a class, on the unit sphere",
        direction="none",
        needs="backbone",
    ),
    "class_geometry": TaskSpec(
        name="class_geometry",
        config=class_geometry.ClassGeometryConfig(),
        evaluate=class_geometry.evaluate,
        protocol=class_geometry.protocol,
        splits=class_geometry.splits,
        check=class_geometry.check,
        metric_names=class_geometry.metric_names,
        summary="discriminative ratio, mixtureness with unseen classes, feature redundancy",
        direction="none",
    ),
    "cam": TaskSpec(
        name="cam",
        config=cam.CamConfig(),
        evaluate=cam.evaluate,
        protocol=cam.protocol,
        splits=cam.splits,
        check=cam.check,
        metric_names=cam.metric_names,
        summary="class activation maps of a fitted linear classifier: grid, area, entropy, concentration",
        direction="none",
        needs="backbone",
        compare=cam.compare,
        paired=False,
    ),
    "inversion": TaskSpec(
        name="inversion",
        config=inversion.InversionConfig(),
        evaluate=inversion.evaluate,
        protocol=inversion.protocol,
        splits=inversion.splits,
        check=inversion.check,
        metric_names=inversion.metric_names,
        summary="pictures with the same feature map, found by a deep image prior, and their distance to the image",
        direction="none",
        needs="backbone",
        compare=inversion.compare,
    ),
    "few_shot_finetune": TaskSpec(
        name="few_shot_finetune",
        config=few_shot_finetune.FewShotFinetuneConfig(),
        evaluate=few_shot_finetune.evaluate,
        protocol=few_shot_finetune.protocol,
        splits=few_shot_finetune.splits,
        check=few_shot_finetune.check,
        metric_names=few_shot_finetune.metric_names,
        summary="few-shot with a linear classifier trained on each task (Chen et al.), and base-class accuracy",
        compare=few_shot_finetune.compare,
    ),
    "concept_generalization": TaskSpec(
        name="concept_generalization",
        config=concept_generalization.ConceptGeneralizationConfig(),
        evaluate=concept_generalization.evaluate,
        protocol=concept_generalization.protocol,
        splits=concept_generalization.splits,
        check=concept_generalization.check,
        metric_names=concept_generalization.metric_names,
        summary="top-1 of logistic regression among classes that pretraining never saw (ImageNet-CoG)",
        compare=concept_generalization.compare,
    ),
    "domains": TaskSpec(
        name="domains",
        config=domains.DomainsConfig(),
        evaluate=domains.evaluate,
        protocol=domains.protocol,
        splits=domains.splits,
        check=domains.check,
        metric_names=domains.metric_names,
        summary="linear evaluation on further data sets, given by --domains (the 12-domain protocol)",
        compare=domains.compare,
    ),
    "feature_plots": TaskSpec(
        name="feature_plots",
        config=feature_plots.FeaturePlotsConfig(),
        evaluate=feature_plots.evaluate,
        protocol=feature_plots.protocol,
        splits=feature_plots.splits,
        check=feature_plots.check,
        metric_names=feature_plots.metric_names,
        summary="t-SNE or UMAP of base and unseen classes, and the silhouette of the unseen ones",
        direction="none",
        compare=feature_plots.compare,
    ),
    "classification": TaskSpec(
        name="classification",
        config=classification.ClassificationConfig(),
        evaluate=classification.evaluate,
        protocol=classification.protocol,
        splits=classification.splits,
        check=classification.check,
        metric_names=classification.metric_names,
        summary="top-1 of the fine-tuned backbone with a linear classifier (coarse classes where the data have them)",
        needs="fine_tuning",
        compare=classification.compare,
        check_data=classification.check_data,
    ),
    "pose": TaskSpec(
        name="pose",
        config=pose.PoseConfig(),
        evaluate=pose.evaluate,
        protocol=pose.protocol,
        splits=pose.splits,
        check=pose.check,
        metric_names=pose.metric_names,
        summary="accuracy of the fine-tuned backbone on five pose bins (Newell & Deng)",
        needs="fine_tuning",
        compare=pose.compare,
        check_data=pose.check_data,
    ),
    "segmentation": TaskSpec(
        name="segmentation",
        config=segmentation_task.SegmentationConfig(),
        evaluate=segmentation_task.evaluate,
        protocol=segmentation_task.protocol,
        splits=segmentation_task.splits,
        check=segmentation_task.check,
        metric_names=segmentation_task.metric_names,
        summary="mIoU, mAcc, aAcc of a fine-tuned FCN, DeepLab v3 or v3+ (Cityscapes, rendered masks)",
        needs="fine_tuning",
        compare=segmentation_task.compare,
        check_data=segmentation_task.check_data,
    ),
    "landmarks": TaskSpec(
        name="landmarks",
        config=landmarks.LandmarksConfig(),
        evaluate=landmarks.evaluate,
        protocol=landmarks.protocol,
        splits=landmarks.splits,
        check=landmarks.check,
        metric_names=landmarks.metric_names,
        summary="error of five fine-tuned landmarks, relative to the eyes' distance (MAFL) or the object's box",
        direction="min",
        needs="fine_tuning",
        compare=landmarks.compare,
        check_data=landmarks.check_data,
    ),
    "detection": TaskSpec(
        name="detection",
        config=detection_task.DetectionConfig(),
        evaluate=detection_task.evaluate,
        protocol=detection_task.protocol,
        splits=detection_task.splits,
        check=detection_task.check,
        metric_names=detection_task.metric_names,
        summary="average precision of a fine-tuned Faster or Mask R-CNN (detectron2), and what its false positives are",
        needs="fine_tuning",
        check_data=detection_task.check_data,
    ),
    "depth": TaskSpec(
        name="depth",
        config=depth.DepthConfig(),
        evaluate=depth.evaluate,
        protocol=depth.protocol,
        splits=depth.splits,
        check=depth.check,
        metric_names=depth.metric_names,
        summary="share of pixels whose fine-tuned depth is within a factor of 1.25 (Newell & Deng)",
        needs="fine_tuning",
        compare=depth.compare,
        check_data=depth.check_data,
    ),
    "utility": TaskSpec(
        name="utility",
        config=utility.UtilityConfig(),
        evaluate=utility.evaluate,
        protocol=utility.protocol,
        splits=utility.splits,
        check=utility.check,
        metric_names=utility.metric_names,
        summary="label efficiency: how many labels pretraining is worth, from a grid of small runs (Newell & Deng)",
        needs="fine_tuning",
        grid=True,
        check_data=utility.check_data,
    ),
    "layer_freezing": TaskSpec(
        name="layer_freezing",
        config=layer_freezing.LayerFreezingConfig(),
        evaluate=layer_freezing.evaluate,
        protocol=layer_freezing.protocol,
        splits=layer_freezing.splits,
        check=layer_freezing.check,
        metric_names=layer_freezing.metric_names,
        summary="accuracy of the fine-tuned backbone with k stages frozen, from none to all (Newell & Deng)",
        needs="fine_tuning",
        grid=True,
        check_data=layer_freezing.check_data,
    ),
}
