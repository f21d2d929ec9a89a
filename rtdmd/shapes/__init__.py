"""A small world of captioned 64×64 pictures in which whether a picture shows its caption is decidable.

``captions`` is the language, ``splits`` draws from it, ``scenes`` and ``drawing`` make pictures,
``negatives`` makes false captions, ``verifier`` judges. Nothing here needs torch.
"""
