"""Admission: decides who may join, inside one transaction of the store."""
