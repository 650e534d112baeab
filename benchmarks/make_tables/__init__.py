"""What `tables.py` writes: a function for each table, by subject, over the files of results."""

from collections.abc import Callable, Iterable

from make_tables import exact, examples, kernels, layers, recall, running
from make_tables.source import Row

TABLES: dict[str, Callable[[], Iterable[Row]]] = {
    "accuracy": exact.accuracy,
    "agreement": exact.agreement,
    "backends-by-sum": kernels.backends_by_sum,
    "compiled-cpu": layers.compiled_cpu,
    "deploy-cpu": running.deploy_cpu,
    "distributed-cpu": running.distributed_cpu,
    "features": exact.features,
    "floors-cpu": layers.floors_cpu,
    "forecast": examples.forecast,
    "generation-cpu": lambda: running.generation("generation-cpu"),
    "generation-h200": lambda: running.generation("generation-h200"),
    "generation-short": running.generation_short,
    "half-errors": exact.half_errors,
    "half-rounding": exact.half_rounding,
    "half-training": exact.half_training,
    "kernel-cpu": kernels.kernel_cpu,
    "kernel-h200": kernels.kernel_h200,
    "layer-cpu": layers.layer_cpu,
    "layer-cpu-forward": lambda: layers.layer_cpu(backward=False),
    "layer-h200": layers.layer_h200,
    "learned-by-init": recall.learned_by_init,
    "learned-by-option": recall.learned_by_option,
    "memory-cpu": layers.memory_cpu,
    "modes-by-shape": layers.modes_by_shape,
    "operations-cpu": layers.operations_cpu,
    "paper": examples.paper,
    "peers-cpu": layers.peers_cpu,
    "peers-short": layers.peers_short,
    "rates-cpu": layers.rates_cpu,
    "reach-by-dt": recall.reach_by_dt,
    "recall-by-lag": recall.recall_by_lag,
    "resets-cpu": layers.resets_cpu,
    "training-h200": layers.training_h200,
}
