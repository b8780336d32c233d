"""What several tests share: toys, laws that every backend must keep, and what runs in processes of its own."""

from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the repository
