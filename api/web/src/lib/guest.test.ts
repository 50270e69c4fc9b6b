// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
import { expect, test } from 'vitest';

import { healthText, imageFacts, taskTitle } from './guest';

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

test('the image of a container', () => {
  expect(imageFacts(undefined)).toEqual([]);
  expect(imageFacts('sha256:00')).toEqual([['Image', 'sha256:00']]);
  expect(imageFacts('sha256:00,name=example.org/app:1,ports=443/tcp;80/tcp')).toEqual([
    ['Image', 'example.org/app:1'],
    ['Ports', '443/tcp, 80/tcp'],
  ]);
});
