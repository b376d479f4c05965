"""Domain mixing: from which domain each next candidate comes, and how losses move that.

One mixture a file; one is added by its file and one import line here.
"""

from onlinesel.mixing.doremi import DoReMi
from onlinesel.mixing.fixed_mixture import FixedMixture
from onlinesel.mixing.odm import ODM
from onlinesel.mixing.sampler import DomainSampler
from onlinesel.mixing.types import Mixture

__all__ = ["ODM", "DoReMi", "DomainSampler", "FixedMixture", "Mixture"]
