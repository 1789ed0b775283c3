"""The decoder, ignorant of methods and of training.

One legend of shape letters for the whole package: ``B`` batch, ``T`` tokens, ``S`` cached or source tokens, ``D``
width, ``F`` MLP width, ``N`` query heads, ``K`` key/value heads, ``H`` head size, ``V`` vocabulary, ``R`` rank.
"""
