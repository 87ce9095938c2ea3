# Copied from base_model/models/__init__.py
