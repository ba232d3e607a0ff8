"""The settings that the authors of the forecasters published, by data set, steps read and steps forecast.

Keys are such as "etth1_96_96". Each value holds the arguments of the model, and under "training" those of its published
training: Adam's learning rate, windows a batch, and epochs. All minimise the mean squared error and keep the weights of
the best validation loss. S-Mamba and MambaTS halve the rate after every epoch and stop after 3 without a better loss.
"""

from __future__ import annotations

import difflib
from typing import Any

Settings = dict[str, dict[str, Any]]

_VARIATES = {
    "covid19": 948, "electricity": 321, "etth1": 7, "etth2": 7, "ettm1": 7, "ettm2": 7, "exchange": 8, "pems": 358,
    "pems03": 358, "pems04": 307, "pems07": 883, "pems08": 170, "solar": 137, "traffic": 862, "weather": 21,
}  # fmt: skip

# Steps forecast: layers, width, states, learning rate, windows a batch, epochs. Lookback 96.
_S_MAMBA = {
    "electricity": {
        96: (3, 512, 16, 0.001, 16, 5),
        192: (3, 512, 32, 0.0005, 16, 5),
        336: (3, 512, 32, 0.0005, 16, 5),
        720: (3, 512, 32, 0.0005, 16, 5),
    },
    "etth1": {
        96: (2, 256, 2, 7e-05, 32, 10),
        192: (2, 256, 2, 7e-05, 32, 10),
        336: (2, 256, 2, 5e-05, 32, 10),
        720: (2, 256, 2, 5e-05, 32, 10),
    },
    "etth2": {
        96: (2, 256, 2, 4e-05, 32, 10),
        192: (2, 256, 2, 4e-05, 32, 10),
        336: (2, 256, 2, 3e-05, 32, 10),
        720: (2, 256, 2, 7e-05, 32, 10),
    },
    "ettm1": {
        96: (2, 256, 2, 5e-05, 32, 10),
        192: (2, 128, 2, 5e-05, 32, 10),
        336: (2, 128, 2, 5e-05, 32, 10),
        720: (2, 128, 2, 5e-05, 32, 10),
    },
    "ettm2": {
        96: (2, 256, 2, 5e-05, 32, 10),
        192: (2, 128, 2, 5e-05, 32, 10),
        336: (2, 128, 2, 3e-05, 32, 10),
        720: (2, 128, 2, 5e-05, 32, 10),
    },
    "exchange": {
        96: (2, 128, 32, 0.0001, 16, 10),
        192: (2, 128, 32, 0.0001, 32, 10),
        336: (2, 128, 32, 5e-05, 32, 10),
        720: (2, 128, 32, 5e-05, 32, 10),
    },
    "pems03": {
        12: (4, 512, 32, 0.001, 32, 5),
        24: (4, 512, 32, 0.001, 32, 10),
        48: (5, 512, 32, 0.0001, 32, 10),
        96: (4, 512, 32, 0.0015, 32, 10),
    },
    "pems04": {
        12: (4, 1024, 32, 0.0003, 32, 10),
        24: (4, 1024, 32, 0.0003, 32, 10),
        48: (4, 1024, 32, 0.0003, 32, 10),
        96: (4, 1024, 32, 0.0003, 32, 10),
    },
    "pems07": {
        12: (2, 512, 32, 0.0007, 16, 10),
        24: (2, 512, 32, 0.0007, 32, 10),
        48: (4, 512, 32, 0.0005, 16, 10),
        96: (4, 512, 32, 0.0005, 16, 10),
    },
    "pems08": {
        12: (2, 512, 32, 0.001, 32, 10),
        24: (2, 512, 32, 0.0007, 32, 10),
        48: (4, 256, 32, 0.001, 16, 10),
        96: (4, 256, 32, 0.001, 16, 10),
    },
    "solar": {
        96: (2, 512, 32, 0.0001, 32, 10),
        192: (2, 512, 32, 0.0001, 32, 10),
        336: (2, 512, 32, 0.0001, 32, 10),
        720: (2, 512, 32, 0.0001, 32, 10),
    },
    "traffic": {
        96: (4, 512, 32, 0.001, 16, 10),
        192: (4, 512, 32, 0.001, 16, 10),
        336: (4, 512, 32, 0.002, 16, 10),
        720: (4, 512, 32, 0.0008, 16, 10),
    },
    "weather": {
        96: (3, 512, 2, 5e-05, 32, 5),
        192: (3, 512, 2, 5e-05, 32, 5),
        336: (3, 512, 2, 5e-05, 32, 5),
        720: (3, 512, 2, 5e-05, 32, 5),
    },
}

# Steps forecast: n1, n2, dropout. Lookback 96.
_TIMEMACHINE = {
    "etth1": {
        96: (512, 32, 0.7),
        192: (512, 64, 0.7),
        336: (512, 128, 0.7),
        720: (128, 16, 0.7),
    },
    "etth2": {
        96: (128, 32, 0.7),
        192: (256, 32, 0.7),
        336: (512, 64, 0.7),
        720: (256, 128, 0.7),
    },
    "ettm1": {
        96: (256, 64, 0.6),
        192: (512, 32, 0.6),
        336: (128, 16, 0.6),
        720: (512, 128, 0.6),
    },
    "weather": {
        96: (128, 16, 0.1),
        192: (512, 128, 0.5),
        336: (128, 64, 0.0),
        720: (512, 256, 0.0),
    },
    "electricity": {
        96: (512, 128, 0.0),
        192: (512, 256, 0.0),
        336: (512, 256, 0.4),
        720: (512, 8, 0.0),
    },
    "traffic": {
        96: (512, 16, 0.3),
        192: (512, 256, 0.1),
        336: (512, 256, 0.1),
        720: (512, 128, 0.1),
    },
}

# Steps forecast: layers, width, dropout, learning rate, windows a batch. Lookback 720, of Covid-19 96.
_MAMBATS = {
    "covid19": {
        12: (4, 128, 0.2, 0.001, 16),
        24: (4, 128, 0.2, 0.001, 16),
        48: (4, 128, 0.2, 0.001, 16),
        96: (4, 128, 0.2, 0.001, 16),
    },
    "electricity": {
        96: (4, 128, 0.2, 0.0005, 16),
        192: (4, 128, 0.2, 0.0005, 16),
        336: (4, 128, 0.2, 0.0005, 16),
        720: (4, 128, 0.2, 0.0005, 16),
    },
    "etth2": {
        96: (5, 16, 0.3, 0.001, 8),
        192: (3, 16, 0.3, 0.001, 16),
        336: (2, 32, 0.3, 0.0005, 32),
        720: (1, 128, 0.3, 0.0005, 16),
    },
    "ettm2": {
        96: (3, 16, 0.3, 0.001, 16),
        192: (3, 16, 0.3, 0.001, 16),
        336: (3, 16, 0.3, 0.001, 16),
        720: (3, 16, 0.3, 0.001, 16),
    },
    "pems": {
        12: (6, 128, 0.2, 0.001, 16),
        24: (6, 128, 0.2, 0.001, 16),
        48: (6, 128, 0.2, 0.001, 16),
        96: (6, 128, 0.2, 0.001, 16),
    },
    "traffic": {
        96: (4, 512, 0.2, 0.0005, 8),
        192: (4, 512, 0.2, 0.0005, 8),
        336: (4, 512, 0.2, 0.0005, 8),
        720: (4, 512, 0.2, 0.0005, 8),
    },
    "solar": {
        96: (3, 32, 0.3, 0.0005, 16),
        192: (3, 32, 0.3, 0.0005, 16),
        336: (3, 32, 0.3, 0.0005, 16),
        720: (3, 32, 0.3, 0.0005, 16),
    },
    "weather": {
        96: (3, 32, 0.2, 0.0005, 8),
        192: (2, 32, 0.3, 0.001, 16),
        336: (2, 32, 0.3, 0.001, 8),
        720: (2, 32, 0.3, 0.001, 8),
    },
}


def _s_mamba() -> Settings:
    found: Settings = {}
    for name, rows in _S_MAMBA.items():
        for pred_len, (depth, dim, d_state, lr, batch_size, epochs) in rows.items():
            found[f"{name}_96_{pred_len}"] = {
                "in_chans": _VARIATES[name],
                "seq_len": 96,
                "pred_len": pred_len,
                "depth": depth,
                "dim": dim,
                "d_ff": dim,
                "d_state": d_state,
                "use_norm": name not in ("pems04", "pems07"),
                "training": {"lr": lr, "batch_size": batch_size, "max_epochs": epochs},
            }
    return found


def _timemachine() -> Settings:
    batches = {"ettm1": 1024, "electricity": 16, "traffic": 16}
    found: Settings = {}
    for name, rows in _TIMEMACHINE.items():
        for pred_len, (n1, n2, dropout) in rows.items():
            found[f"{name}_96_{pred_len}"] = {
                "in_chans": _VARIATES[name],
                "seq_len": 96,
                "pred_len": pred_len,
                "n1": n1,
                "n2": n2,
                "dropout": dropout,
                "affine": name != "traffic",
                "independent": _VARIATES[name] <= 21,
                "training": {"lr": 1e-3, "batch_size": batches.get(name, 512), "max_epochs": 100},
            }
    return found


def _mambats() -> Settings:
    found: Settings = {}
    for name, rows in _MAMBATS.items():
        seq_len = 96 if name == "covid19" else 720
        for pred_len, (depth, dim, dropout, lr, batch_size) in rows.items():
            found[f"{name}_{seq_len}_{pred_len}"] = {
                "in_chans": _VARIATES[name],
                "seq_len": seq_len,
                "pred_len": pred_len,
                "depth": depth,
                "dim": dim,
                "dropout": dropout,
                "training": {"lr": lr, "batch_size": batch_size, "max_epochs": 10},
            }
    return found


PUBLISHED: dict[str, Settings] = {"s_mamba": _s_mamba(), "timemachine": _timemachine(), "mambats": _mambats()}


def published_arguments(name: str, published: str | None) -> dict[str, Any]:
    """The arguments of `name` for a key such as "etth1_96_96"; none for None.

    Raises:
        ValueError: an unknown key.
    """
    if published is None:
        return {}
    if published not in PUBLISHED[name]:
        near = difflib.get_close_matches(published, PUBLISHED[name], n=3, cutoff=0.3)
        raise ValueError(
            f"published={published!r} is unknown for {name}; keys are DATA_STEPS_FORECAST, such as {', '.join(near)}"
        )
    return {key: value for key, value in PUBLISHED[name][published].items() if key != "training"}
