"""Frames -> run-length tokens: which patches repeat, for how long, and the rules that choose (paper, section 3.1)."""

from rlt.tokens.differences import PatchView, token_differences
from rlt.tokens.naming import change_rule, choose_rule, make_rule, rule_line, rule_name, rule_options
from rlt.tokens.rules import RULES, Budget, Drawn, Everything, Random, Rule, Threshold, UniformFrames, register_rule
from rlt.tokens.token_stream import TokenStream
from rlt.tokens.tokenize import Frames, keep_mask, run_lengths, select_tokens, tokenize, tokenize_batch

__all__ = [
    "RULES",
    "Budget",
    "Drawn",
    "Everything",
    "Frames",
    "PatchView",
    "Random",
    "Rule",
    "Threshold",
    "TokenStream",
    "UniformFrames",
    "change_rule",
    "choose_rule",
    "keep_mask",
    "make_rule",
    "register_rule",
    "rule_line",
    "rule_name",
    "rule_options",
    "run_lengths",
    "select_tokens",
    "token_differences",
    "tokenize",
    "tokenize_batch",
]
