"""MLflow's model registry: the ONNX graph with a signature, an input example and where it comes from.

The ONNX flavour because it loads anywhere without this project's code and without unpickling. All writes name their
store and their experiment: nothing of MLflow's global state is read or changed, so Ray workers inherit none.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayjobs.exporters.contracts import Source
from rayjobs.exporters.folder import SEED
from rayjobs.exporters.onnx_format import INPUT, OUTPUTS
from rayjobs.tracking import Tracker

__all__ = ["register_model"]


def register_model(tracker: Tracker, name: str, graph: Path, source: Source) -> str:
    """Store the graph as a logged model of a run and as the next version of a registered model.

    Args:
        tracker: the experiment.
        name: of the registered model; made if there is none.
        graph: a verified ONNX file.
        source: where it comes from.

    Returns:
        The version.
    """
    import mlflow
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    mlflow.set_tracking_uri(tracker.uri)  # the registry looks the logged model up in the process's default store
    client = MlflowClient(tracker.uri)
    tags = source.provenance()
    digest = hashlib.sha256(graph.read_bytes()).hexdigest()[:16]
    run = tracker.run(f"export {name}", {"key": f"export/{name}/{digest}", "kind": "export", **tags})
    run.params(tags)
    status = "FAILED"
    try:
        logged = client.create_logged_model(
            tracker.experiment_id, name=name, source_run_id=run.run_id, tags=tags, model_type="backbone"
        )
        with tempfile.TemporaryDirectory(prefix="export-") as folder:
            _save(Path(folder) / "model", graph, source, logged)
            client.log_model_artifacts(logged.model_id, str(Path(folder) / "model"))
        client.finalize_logged_model(logged.model_id, "READY")
        client.log_outputs(run.run_id, [LoggedModelOutput(logged.model_id, step=0)])
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        uri = f"models:/{logged.model_id}"
        version = client.create_model_version(name, uri, run.run_id, tags=tags, model_id=logged.model_id)
        status = "FINISHED"
    finally:
        run.end(status)
    return str(version.version)


def _save(folder: Path, graph: Path, source: Source, logged: Any) -> None:
    """MLflow's folder of a model."""
    import onnx  # type: ignore[import-not-found]  # an extra
    import onnxruntime  # type: ignore[import-not-found]  # an extra
    from mlflow.models import Model
    from mlflow.onnx import save_model

    model = onnx.load(graph)
    side = source.image_size
    generator = torch.Generator().manual_seed(SEED)
    save_model(
        model,
        str(folder),
        mlflow_model=Model(
            artifact_path=logged.artifact_location,
            model_uuid=logged.model_id,
            run_id=logged.source_run_id,
            model_id=logged.model_id,
            metadata=source.provenance(),
        ),
        signature=_signature(model, source),
        input_example=torch.randn(1, 3, side, side, generator=generator).numpy(),
        # Named here: MLflow would find them by loading the model in another process.
        pip_requirements=[f"onnx=={onnx.__version__}", f"onnxruntime=={onnxruntime.__version__}", "numpy"],
        save_as_external_data=False,
    )


def _signature(model: Any, source: Source) -> Any:
    """Names, types and shapes of the graph; -1 stands for any size."""
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    dims = model.graph.input[0].type.tensor_type.shape.dim
    shape = tuple(-1 if dim.dim_param else dim.dim_value for dim in dims)
    channels = source.backbone.num_features
    outputs = {OUTPUTS[0]: (-1, channels, -1, -1), OUTPUTS[1]: (-1, channels)}
    kind = np.dtype("float32")
    return ModelSignature(
        Schema([TensorSpec(kind, shape, INPUT)]), Schema([TensorSpec(kind, s, name) for name, s in outputs.items()])
    )
