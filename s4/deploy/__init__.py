"""A trained model as constants in real arithmetic, for tools and machines that know nothing of s4."""

from s4.deploy.files import export
from s4.deploy.frozen import Frozen, freeze

__all__ = ["Frozen", "export", "freeze"]
