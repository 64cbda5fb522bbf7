"""What lies in storage: model files, packed files, saved sessions, hot experts; reading, checking, writing."""
