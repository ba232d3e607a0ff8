"""Published graph models: their arguments, their graphs, the orders that they drew, their files."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mamba_zoo.backbones._graph import Visit
from mamba_zoo.scans import Graphs

from .parity_family import Arguments, Family, recorded, require


def graph_mamba_arguments(kwargs: Arguments) -> tuple[str, Arguments]:
    if "gt" not in kwargs:
        require(kwargs, local_gnn_type="CustomGatedGCN", dropout=0.0, layer_norm=False, batch_norm=True)
        return "graph_mamba_layer", {"dim": kwargs["dim_h"]}
    gt, gnn, data, pe = kwargs["gt"], kwargs["gnn"], kwargs["dataset"], kwargs.get("posenc_LapPE")
    require(gt, dropout=0.0, layer_norm=False, batch_norm=True)
    require(gnn, act="relu", dropout=0.0, l2norm=True, dim_inner=gt["dim_hidden"])
    require(pe or {}, layers=2, model="DeepSet", laplacian_norm="none", eigvec_norm="L2")
    local, order = gt["layer_type"].split("+")
    require({"local": local}, local="CustomGatedGCN")
    plain = data["node_encoder_name"] == "LinearNode"
    bond = data["edge_encoder_name"] == "Bond"
    edge_chans = {"LinearEdge": 1, "VOCEdge": 2}.get(data["edge_encoder_name"])
    arguments = {
        "dim": gt["dim_hidden"],
        "depth": gt["layers"],
        "in_chans": kwargs["dim_in"],
        "num_classes": kwargs["dim_out"],
        "level": {"graph": "graph", "inductive_node": "node"}[gnn["head"]],
        "global_pool": kwargs["model"]["graph_pooling"],
        "encoder": "atom" if data["node_encoder_name"].startswith("Atom") else "linear",
        "edges": "bond" if bond else "none" if edge_chans is None else "linear",
        "edge_chans": edge_chans or 1,
        "pe": "none" if pe is None else "lap",
        "pe_dim": pe["dim_pe"] if pe else 16,
        "encoder_norm": plain,
        "pre_layers": gnn["layers_pre_mp"],
        "head_layers": gnn["layers_post_mp"],
        "buckets": {"Mamba_Hybrid_Degree_Noise": 1, "Mamba_Hybrid_Degree_Noise_Bucket": 3}[order],
    }
    return "graph_mamba_mnist", arguments


def graph_mamba_run(model: Any, inputs: dict[str, Tensor], fixture: dict[str, Any]) -> dict[str, Tensor]:
    edge_index, batch = (torch.tensor(fixture["graph"][name]) for name in ("edge_index", "batch"))
    data = SimpleNamespace(edge_index=edge_index, batch=batch)
    for name in ("x", "edge_attr"):
        spec = fixture["inputs"][name]
        setattr(data, name, torch.tensor(spec["values"]) if "values" in spec else inputs[name])
    graphs = Graphs.of(data)
    if "cases" in fixture:
        return run_layer(model, data, graphs, fixture["cases"])
    if "EigVecs" in fixture["inputs"]:
        data.EigVecs = table(fixture["inputs"]["EigVecs"]["values"])
        data.EigVals = table(fixture["inputs"]["EigVals"]["per_graph"])[batch][..., None]
    assert model.orders.samples == 5, "a published checkpoint is evaluated as published"
    drawn = [visit(order, graphs) for order in fixture["orders"]]
    visits = [drawn[5 * i : 5 * i + 5] for i in range(len(model.layers))]
    with recorded(encoded=model.encoder, layer0=model.layers[0]) as outputs:
        features = model.forward_features(data, visits)
        logits = model.forward_head(features, data)
    return {"encoded": outputs["encoded"], "layer0": outputs["layer0"][0], "layers": features, "logits": logits}


def run_layer(layer: Any, data: Any, graphs: Graphs, cases: dict[str, Any]) -> dict[str, Tensor]:
    outputs = {}
    for name, case in cases.items():
        visits = [visit(order, graphs) for order in case["orders"]] or [Visit(None, graphs.ptr)]
        heard: list[Tensor] = []
        hook = layer.norm_mixer.register_forward_pre_hook(lambda _, arguments, heard=heard: heard.append(arguments[0]))
        x, edges = layer(data.x, data.edge_index, data.edge_attr, visits)
        hook.remove()
        outputs |= {f"{name}: x": x, f"{name}: attn_plus_residual": heard[0], "edge_attr": edges}
    return outputs


def visit(order: dict[str, Any], graphs: Graphs) -> Visit:
    nodes, sizes = torch.tensor(order["perm"]), order["buckets"]
    if sizes is None:
        return Visit(nodes[None], graphs.ptr)
    group = torch.empty_like(nodes)
    group[nodes] = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return Visit.split(nodes[None], graphs, group)


def table(rows: list[list[float | None]]) -> Tensor:
    return torch.tensor([[float("nan") if value is None else value for value in row] for row in rows])


def graph_mamba_container(state: dict[str, Tensor]) -> Any:
    """GraphGym keeps a model under its own name, which a layer alone does not have."""
    whole = any(re.match(r"layers\.", name) for name in state)
    return {"model_state": {f"model.{name}" if whole else name: value for name, value in state.items()}}


FAMILIES = {"graph": Family(graph_mamba_arguments, graph_mamba_run, graph_mamba_container)}
