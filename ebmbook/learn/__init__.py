"What every training needs: settings, runs, the loop, losses of rivals."
