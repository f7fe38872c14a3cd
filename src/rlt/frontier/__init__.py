"""How faithful fewer tokens are to the dense network: agreement, divergence and accuracy against what they cost."""

from rlt.frontier.arms import FrontierArm, default_arms
from rlt.frontier.measure import measure_frontier
from rlt.frontier.results import FrontierResult
from rlt.frontier.run import cache_folder, frontier_config

__all__ = ["FrontierArm", "FrontierResult", "cache_folder", "default_arms", "frontier_config", "measure_frontier"]
