"""The commands, one file each; ``tools/`` and the console command ``vitoats`` call them."""
