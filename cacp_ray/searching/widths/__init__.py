"""Strategies that learn widths while the network trains, instead of a search before it."""
