"""Who may join: one decision, inside one transaction of the store."""
