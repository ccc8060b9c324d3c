"""Settings of the whole test session; they must be in the environment before Ray is imported anywhere."""

from __future__ import annotations

import os

os.environ.update(
    RAY_AUTH_MODE="disabled",  # ray.init turns token authentication on, which the job submission client does not read
    RAY_USAGE_STATS_ENABLED="0",
    RAY_prestart_worker_first_driver="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_DATA_USE_DATASOURCE_V2="0",  # starts up to 32 footer readers for every execution
    RAY_TRAIN_ENABLE_PRINT_PATCH="0",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",
    RAY_TRAIN_METRICS_ENABLED="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="60",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    TUNE_GLOBAL_CHECKPOINT_S="1",
    TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S="0",
    TUNE_DISABLE_STRICT_METRIC_CHECKING="1",
    OMP_NUM_THREADS="1",
)
# A cluster of the user's must not be joined, and ray.init() without an address would.
os.environ.pop("RAY_ADDRESS", None)
