"""Measurements of each stage beside its peers, in one process, on real video."""

from rlt.benchmark.suites import SUITES, Arm, BenchmarkResult, BenchmarkSettings, run_suite

__all__ = ["SUITES", "Arm", "BenchmarkResult", "BenchmarkSettings", "run_suite"]
