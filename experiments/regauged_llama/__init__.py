"""Fine-tuning a Llama of transformers whose checkpoint was re-gauged"""
