"""Miners, used as PML's own."""

from .contextual_similarity_miner import ContextualSimilarityMiner

__all__ = ["ContextualSimilarityMiner"]
