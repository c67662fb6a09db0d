"""The contract: .proto files, the classes generated from them, the wire form of its rows."""
