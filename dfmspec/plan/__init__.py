"""Resolved -> Plan: files and commands, the same bytes wherever they are made, and the words that show them."""
