"""The threshold for a data set: the one that keeps a given share of its tokens, or the largest that answers alike."""

from rlt.calibrate.plot import write_calibration_plot
from rlt.calibrate.results import CalibrateSettings, Calibration, Step
from rlt.calibrate.run import LADDER, calibrate_agreement, calibrate_tokens

__all__ = [
    "LADDER",
    "CalibrateSettings",
    "Calibration",
    "Step",
    "calibrate_agreement",
    "calibrate_tokens",
    "write_calibration_plot",
]
