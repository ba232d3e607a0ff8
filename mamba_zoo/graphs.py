"""Graphs with PyTorch Geometric: transforms that prepare data, Mamba in its layers, and how models depend on numbering.

The models themselves, `graph_mamba` and `gmn`, take PyG's `Data` and `Batch` and need this module only for data.

>>> from torch_geometric.data import Batch
>>> from torch_geometric.datasets import KarateClub
>>> from mamba_zoo import create_model
>>> data = AddOrder("both_ways(degree)")(KarateClub()[0])
>>> model = create_model("graph_mamba", in_chans=34, num_classes=4, level="node", scan="both_ways(degree)")
>>> model(data).shape
torch.Size([34, 4])
"""

from .backbones._pyg import AddLaplacian, AddOrder, MambaGPSConv, relabelled, relabelling_sensitivity
from .scans import Graphs, graph_order, graph_scan, register_graph_order

__all__ = [
    "AddLaplacian",
    "AddOrder",
    "Graphs",
    "MambaGPSConv",
    "graph_order",
    "graph_scan",
    "register_graph_order",
    "relabelled",
    "relabelling_sensitivity",
]
