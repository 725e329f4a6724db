"""DéjàVu: the client library and the command line."""
