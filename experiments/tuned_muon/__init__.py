"""Tuned DDCMuon against tuned Muon"""
