"""The packed network and patched classifiers as `torch.export` programs."""

from rlt.adapters.export import export_patched
from rlt.network.export import export_network, network_inputs

__all__ = ["export_network", "export_patched", "network_inputs"]
