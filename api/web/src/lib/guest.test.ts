// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
import { expect, test } from 'vitest';

import { healthText, taskTitle } from './guest';

test('health in words', () => {
  expect(healthText({ health: 'healthy' })).toBe('healthy');
  expect(healthText({ health: 'starting', 'health-failures': 0, 'health-message': 'refused' })).toBe('starting: refused');
  expect(healthText({ health: 'healthy', 'health-failures': 1 })).toBe('healthy, failed once');
  expect(healthText({ health: 'unhealthy', 'health-failures': 3, 'health-message': 'refused' })).toBe(
    'unhealthy, failed 3 times in a row: refused',
  );
});

test('the task that ends a container which does not work', () => {
  expect(taskTitle('vzunhealthy', '101')).toBe('Container 101: end, since it does not work');
});
