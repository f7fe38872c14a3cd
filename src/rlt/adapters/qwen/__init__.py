"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL of Hugging Face transformers: fewer columns before the vision tower."""

from rlt.adapters.qwen.adapter import QwenVLAdapter

__all__ = ["QwenVLAdapter"]
