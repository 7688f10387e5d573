"""The page of every report: what it escapes, what it never asks for, what it draws."""
