"""Compression methods, one file each; importing the package fills the table of methods."""

from vitoats.methods import alps as _alps  # noqa: F401
from vitoats.methods import dass as _dass  # noqa: F401
from vitoats.methods import dsnot as _dsnot  # noqa: F401
from vitoats.methods import magnitude as _magnitude  # noqa: F401
from vitoats.methods import mrp as _mrp  # noqa: F401
from vitoats.methods import numerical as _numerical  # noqa: F401
from vitoats.methods import oats as _oats  # noqa: F401
from vitoats.methods import oats_h as _oats_h  # noqa: F401
from vitoats.methods import sparsegpt as _sparsegpt  # noqa: F401
from vitoats.methods import svd as _svd  # noqa: F401
from vitoats.methods import wanda as _wanda  # noqa: F401
